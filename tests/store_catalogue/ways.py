"""Ways to reach a store that lives in this process: on the loop of its core, from another thread's loop, over HTTP.

Who calls it: tests/unit/test_store_catalogue*.py, each with its journals.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from typing import Any

import pytest

import store_catalogue
from agl_ray.store import LightningStore, StoreCore
from agl_ray.store.journals.settings import JournalSettings
from store_catalogue.common import Restart, Scenario

Reached = tuple[LightningStore, LightningStore, Restart]
"""The client, another client of the same store, and the way to restart it."""
Open = Callable[[str, dict[str, Any]], AbstractAsyncContextManager[Reached]]


@asynccontextmanager
async def in_process(url: str, options: dict[str, Any]) -> AsyncIterator[Reached]:
    """On the loop of the core itself."""
    core = await StoreCore.open(url, **options)

    async def restart() -> LightningStore:
        nonlocal core
        await core.close()
        core = await StoreCore.open(url, **options)
        return LightningStore.local(core)

    try:
        yield LightningStore.local(core), LightningStore.local(core), restart
    finally:
        await core.close()


def _served(client: Callable[[Any], LightningStore]) -> Open:
    @asynccontextmanager
    async def reach(url: str, options: dict[str, Any]) -> AsyncIterator[Reached]:
        from http_store import served

        stack = ExitStack()
        try:
            server = await asyncio.to_thread(stack.enter_context, served(url, **options))

            async def restart() -> LightningStore:
                await asyncio.to_thread(stack.close)
                return client(await asyncio.to_thread(stack.enter_context, served(url, **options)))

            yield client(server), client(server), restart
        finally:
            await asyncio.to_thread(stack.close)

    return reach


other_loop = _served(lambda server: server.local())
over_http = _served(lambda server: server.client())


WAYS: dict[str, tuple[Open, str]] = {
    "memory": (in_process, "memory://"),
    "sqlite": (in_process, "sqlite:///{folder}/store.db"),
    "loop": (other_loop, "sqlite:///{folder}/store.db"),
    "http": (over_http, "sqlite:///{folder}/store.db"),
}
"""By name: how to reach the store, and the journal's URL."""


def go(scenario: Scenario, reach: Open, url: str, settings: JournalSettings | None = None) -> None:
    """Run a scenario on the empty store at `url`."""
    if url == "memory://" and store_catalogue.wants(scenario, "restart"):
        pytest.skip("memory:// keeps nothing over a restart")

    async def main() -> None:
        options = {"settings": settings, **store_catalogue.options_of(scenario)}
        async with reach(url, options) as (store, elsewhere, restart):
            given = {"elsewhere": elsewhere, "restart": restart}
            asked = {
                name: one for name, one in given.items() if store_catalogue.wants(scenario, name)
            }
            await scenario(store, **asked)

    asyncio.run(main())
