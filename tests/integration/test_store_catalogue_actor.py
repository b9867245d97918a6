"""The behaviour catalogue of the store, through its actor: one process, an empty store per scenario."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("store_catalogue")

from store_catalogue import label, options_of, scenarios, wants  # noqa: E402
from store_catalogue.common import Scenario  # noqa: E402

from actors.store import MAX_CONCURRENCY, Store  # noqa: E402
from agl_ray.store import LightningStore  # noqa: E402
from agl_ray.store.transport import ActorTransport  # noqa: E402

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.slow]


def many_stores() -> type[Store]:
    """Made in a function, so that it travels to the actor's process, which has no tests to import."""

    class ManyStores(Store):
        """The store's actor, which can be made to start a new life."""

        async def renew(self, url: str, options: dict[str, Any]) -> None:
            """End the core as it stands and become a store of this journal."""
            await self.shutdown()
            Store.__init__(self, url, **options)
            await self.call("ping")

    return ManyStores


@pytest.fixture(scope="module")
def host() -> Iterator[ActorTransport]:
    import ray

    name, namespace = "stores", f"catalogue-{secrets.token_hex(4)}"
    options = {"max_concurrency": MAX_CONCURRENCY, "num_cpus": 0}
    handle = (
        ray.remote(many_stores())
        .options(name=name, namespace=namespace, **options)
        .remote("memory://")
    )
    yield ActorTransport(handle, name, namespace)
    ray.kill(handle)


@pytest.mark.parametrize("scenario", scenarios(), ids=label)
def test_catalogue(scenario: Scenario, host: ActorTransport, tmp_path: Path) -> None:
    url, options = f"sqlite:///{tmp_path}/store.db", options_of(scenario)

    async def restart() -> LightningStore:
        await host.handle.renew.remote(url, options)
        return LightningStore(host)

    async def main() -> None:
        store = await restart()
        given = {"elsewhere": LightningStore(host), "restart": restart}
        asked = {name: one for name, one in given.items() if wants(scenario, name)}
        await scenario(store, **asked)

    asyncio.run(main())
