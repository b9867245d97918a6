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
from actors.store_door import FACADE_PREFIXES, PREFIX, store_door
from agl_ray.store import LightningStore
from agl_ray.types import EndReason, EnqueueRolloutRequest, InputError, NotFound

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

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
    for prefix in (PREFIX, *FACADE_PREFIXES):
        serve.run(store_door("doors", KEY), name=f"store{prefix}", route_prefix=prefix)
    yield f"http://127.0.0.1:{port}", store
    serve.shutdown()
    asyncio.run(store.shutdown())


def ask(url: str, body: Any = None, key: str | None = KEY) -> tuple[int, Any]:
    """(status, answer of JSON or text); a body makes it a POST of JSON."""
    headers = {"content-type": "application/json"}
    headers |= {} if key is None else {"authorization": f"Bearer {key}"}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as answer:
            status, content = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            status, content = error.code, error.read()
    text = content.decode()
    return status, json.loads(text) if text.startswith(("{", "[")) else text


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
        waiter = asyncio.ensure_future(outside.dequeue_rollout("outside", wait_seconds=50))
        while (await inside.statistics())["waiting_takers"] == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        await inside.enqueue_rollout("late")
        late = await waiter
        assert late is not None
        assert late.input == "late"
        for one in (taken, *both, late):
            await outside.end_attempt(one.rollout_id, one.attempt_id, EndReason.OK, reward=1.0)
        ids = [one.rollout_id for one in rollouts]
        done = await outside.wait_for_rollouts(rollout_ids=ids, timeout=120)
        assert len(done) == 3
        many = await asyncio.gather(*(outside.enqueue_rollout(one) for one in range(40)))
        assert len({one.rollout_id for one in many}) == 40
        with pytest.raises(NotFound, match="ro-none"):
            await outside.get_attempt("ro-none", "at-none")
        with pytest.raises(InputError, match="API key"):
            await LightningStore.http(url).ping()

    asyncio.run(flow())


def test_every_door_is_there_and_the_other_application_is_left_alone(
    doors: tuple[str, LightningStore],
) -> None:
    url, inside = doors
    assert ask(f"{url}/") == (200, "other")
    status, answer = ask(f"{url}/v1/agl/nothing")
    assert (status, answer["error"]["type"]) == (404, "NotFound")
    assert ask(f"{url}/v1/agl/statistics", key=None)[0] == 401
    assert ask(f"{url}/v1/agl/statistics")[1]["durable"] is True
    assert ask(f"{url}/v1/agl/health", key=None)[0] == 200
    assert "/v1/agl/rollouts" in ask(f"{url}/v1/agl/openapi.json")[1]["paths"]
    assert ask(f"{url}/v1/traces", {"resourceSpans": []})[0] == 200
    status, (rollout,) = ask(f"{url}/api/rollouts", [{"input": "through the facade"}])
    assert status == 201
    found = asyncio.run(inside.get_rollout_by_id(rollout["rollout_id"]))
    assert found is not None
    assert found.input == "through the facade"
    assert ask(f"{url}/api/rollouts", [], key=None)[0] == 401
    assert ask(f"{url}/proxy/state")[0] == 200


def test_values_deep_in_one_another(doors: tuple[str, LightningStore]) -> None:
    """As deep as may be is carried to the actor and back; deeper is the caller's error, not a failure on the way."""
    url, _ = doors
    enqueue = f"{url}/v1/agl/queues/rollouts/enqueue"
    nested: Any = 1
    for depth in range(1, 460):
        nested = [nested]
        if depth in (190, 300, 450):
            status, answer = ask(enqueue, {"rollouts": [{"input": nested}]})
            assert status == (201 if depth < 200 else 422), answer
            if depth < 200:
                assert answer[0]["input"] == nested
            else:
                assert "in one another" in answer["error"]["message"]
