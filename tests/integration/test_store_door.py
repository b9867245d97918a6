"""The store's doors on a real Ray Serve, mounted beside another application, over the store actor."""

from __future__ import annotations

import asyncio
import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.store import create_store
from actors.store_door import PREFIX, store_door
from agl_ray.store import LightningStore
from agl_ray.types import EndReason, EnqueueRolloutRequest, InputError, NotFound

pytestmark = pytest.mark.usefixtures("ray_cluster")

KEY = "k-123"


@pytest.fixture(scope="module")
def doors(ray_cluster: None, scratch: Path) -> Iterator[tuple[str, LightningStore]]:
    """(the root URL of Serve, the store actor's client)"""
    from ray import serve

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    store = create_store("store", "doors", f"sqlite:///{scratch}/doors.db")

    @serve.deployment(name="Other")
    class Other:
        async def __call__(self, request: Any) -> str:
            return "other"

    serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": None})
    serve.run(Other.bind(), name="other", route_prefix="/")
    serve.run(store_door("doors", KEY), name="store", route_prefix=PREFIX)
    yield f"http://127.0.0.1:{port}", store
    serve.shutdown()
    asyncio.run(store.shutdown())


def get(url: str, key: str | None = KEY) -> tuple[int, Any]:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_the_client_through_serve(doors: tuple[str, LightningStore]) -> None:
    url, inside = doors

    async def flow() -> None:
        outside = LightningStore.http(url, KEY)
        requests = [EnqueueRolloutRequest(input=one) for one in range(3)]
        rollouts = await outside.enqueue_many_rollouts(requests)
        taken = await inside.dequeue_rollout("inside")
        assert taken is not None
        assert taken.rollout_id == rollouts[0].rollout_id
        both = await outside.dequeue_many_rollouts(limit=5, worker_id="outside")
        assert [one.input for one in both] == [1, 2]
        waiter = asyncio.ensure_future(outside.dequeue_rollout("outside", wait_seconds=30))
        while (await inside.statistics())["waiting_takers"] == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        await inside.enqueue_rollout("late")
        late = await waiter
        assert late is not None
        assert late.input == "late"
        for one in (taken, *both, late):
            await outside.end_attempt(one.rollout_id, one.attempt_id, EndReason.OK, reward=1.0)
        ids = [one.rollout_id for one in rollouts]
        done = await outside.wait_for_rollouts(rollout_ids=ids, timeout=10)
        assert len(done) == 3
        many = await asyncio.gather(*(outside.enqueue_rollout(one) for one in range(40)))
        assert len({one.rollout_id for one in many}) == 40
        with pytest.raises(NotFound, match="ro-none"):
            await outside.get_attempt("ro-none", "at-none")
        with pytest.raises(InputError, match="API key"):
            await LightningStore.http(url).ping()

    asyncio.run(flow())


def test_paths_are_whole_and_the_other_application_is_left_alone(
    doors: tuple[str, LightningStore],
) -> None:
    url, _ = doors
    assert get(f"{url}/") == (200, b"other")
    status, body = get(f"{url}/v1/agl/nothing")
    assert (status, json.loads(body)["error"]["type"]) == (404, "NotFound")
    assert get(f"{url}/v1/agl/statistics", None)[0] == 401
