"""The store as a Ray actor: creation, errors across processes, restarts, clients in other processes, damaged files."""

from __future__ import annotations

import asyncio
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.store import create_store
from agl_ray.spans import span_batch
from agl_ray.store import LightningStore
from agl_ray.types import (
    LLM,
    Conflict,
    EndReason,
    InputError,
    NotFound,
    RolloutStatus,
    StoreError,
    WaitTimeout,
)

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LightningStore]:
    made = create_store("store", f"ns-{tmp_path.name}", f"sqlite:///{tmp_path}/store.db")
    yield made
    asyncio.run(made.shutdown())


def batch(rollout_id: str, attempt_id: str, *names: str) -> Any:
    common = {"kind": "span", "start_ns": 1, "end_ns": 2, "status": "OK"}
    rows = [
        {"rollout_id": rollout_id, "attempt_id": attempt_id, "span_id": n, "name": n} for n in names
    ]
    return span_batch([row | common for row in rows])


def kill_9(handle: Any) -> int:
    """SIGKILL the actor's process; its pid."""
    import ray

    pid = ray.get(handle.pid.remote())
    os.kill(pid, 9)
    return pid


async def takers_are(store: LightningStore, number: int) -> None:
    """Until `number` dequeues wait in the store."""
    for _ in range(3000):
        if (await store.statistics())["waiting_takers"] == number:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"there were never {number} waiting takers")


def test_the_life_of_a_rollout_over_ray(store: LightningStore) -> None:
    async def main() -> None:
        await store.add_resources({"main": LLM(endpoint="http://x", model="m")})
        rollout = await store.enqueue_rollout({"q": 1}, mode="train")
        attempt = await store.dequeue_rollout("w")
        key = (attempt.rollout_id, attempt.attempt_id)
        many = await asyncio.gather(
            *(store.add_spans(*key, batch(*key, str(i))) for i in range(50))
        )
        assert sorted(one for ids in many for one in ids) == list(range(1, 51))
        await store.end_attempt(*key, EndReason.OK, reward=1.0, expected_spans=50)
        (final,) = await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=120)
        assert final.status is RolloutStatus.SUCCEEDED
        table = await store.read_spans([key])
        assert table["sequence_id"].to_pylist() == list(range(1, 51))
        await store.put_state("position", b"7")
        assert await store.get_state("position") == b"7"

    asyncio.run(main())


def test_errors_arrive_as_their_own_types(store: LightningStore) -> None:
    async def main() -> None:
        attempt = await store.start_rollout(1)
        key = (attempt.rollout_id, attempt.attempt_id)
        with pytest.raises(NotFound, match="at-x"):
            await store.end_attempt(attempt.rollout_id, "at-x", EndReason.OK)
        with pytest.raises(NotFound, match="at-x"):
            await store.add_spans(key[0], "at-x", batch(key[0], "at-x", "s"))
        with pytest.raises(InputError, match="finite"):
            await store.end_attempt(*key, EndReason.OK, reward=float("inf"))
        await store.end_attempt(*key, EndReason.OK, reward=1.0)
        with pytest.raises(Conflict, match="already ended ok"):
            await store.end_attempt(*key, EndReason.TIMEOUT)

    asyncio.run(main())


def test_a_blocked_dequeue_wakes_and_a_cancelled_one_takes_nothing(store: LightningStore) -> None:
    async def main() -> None:
        gone = asyncio.create_task(store.dequeue_rollout("gone", wait_seconds=60))
        await takers_are(store, 1)
        gone.cancel()
        await takers_are(store, 0)
        waiting = asyncio.create_task(store.dequeue_rollout("here", wait_seconds=60))
        await takers_are(store, 1)
        rollout = await store.enqueue_rollout("x")
        taken = await waiting
        assert (taken.rollout_id, taken.attempt.worker_id) == (rollout.rollout_id, "here")

    asyncio.run(main())


def test_clients_travel_and_connect_by_name(store: LightningStore, tmp_path: Path) -> None:
    import ray

    @ray.remote(num_cpus=0)
    def elsewhere(client: LightningStore) -> str:
        async def main() -> str:
            return (await client.enqueue_rollout("from a task")).rollout_id

        return asyncio.run(main())

    async def main() -> None:
        name = await elsewhere.remote(store)
        found = LightningStore.connect("store", namespace=f"ns-{tmp_path.name}")
        assert (await found.get_rollout_by_id(name)).input == "from a task"

    assert isinstance(pickle.loads(pickle.dumps(store)), LightningStore)
    asyncio.run(main())
    with pytest.raises(NotFound, match="no store actor"):
        LightningStore.connect("store", namespace="nowhere")
    with pytest.raises(StoreError, match="store"):
        create_store("store", f"ns-{tmp_path.name}", "memory://")


def test_calls_survive_a_restart(store: LightningStore) -> None:
    async def main() -> None:
        attempt = await store.start_rollout("x", worker_id="w")
        key = (attempt.rollout_id, attempt.attempt_id)
        await store.add_spans(*key, batch(*key, "a"))
        blocked = asyncio.create_task(store.dequeue_rollout("w", wait_seconds=120))
        waiting = asyncio.create_task(store.wait_for_rollouts(rollout_ids=[key[0]]))
        await asyncio.sleep(0.1)
        kill_9(store._transport.handle)
        assert await store.add_spans(*key, batch(*key, "b")) == [2]
        assert (await store.statistics())["restarts"] == 1
        await store.end_attempt(*key, EndReason.OK, reward=1.0, expected_spans=2)
        assert [one.rollout_id for one in await waiting] == [key[0]]
        rollout = await store.enqueue_rollout("y")
        assert (await blocked).rollout_id == rollout.rollout_id

    asyncio.run(main())


def test_a_store_that_ended_for_good_is_said_so_at_once(tmp_path: Path) -> None:
    store = create_store("store", f"ns-{tmp_path.name}", f"sqlite:///{tmp_path}/store.db")
    asyncio.run(store.shutdown())
    with pytest.raises(StoreError, match="ended for good"):
        asyncio.run(store.ping())


def test_a_store_that_stays_away_is_a_named_wait(store: LightningStore) -> None:
    impatient = pickle.loads(pickle.dumps(store))
    impatient._away_seconds = 0.0

    async def until_away() -> None:
        for _ in range(10_000):
            await impatient.ping()

    kill_9(store._transport.handle)
    with pytest.raises(WaitTimeout, match="the store to come back"):
        asyncio.run(until_away())
    asyncio.run(store.ping())


def test_a_damaged_file_is_a_store_error_at_creation(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    path.write_bytes(b"not a database at all\n" * 1000)
    namespace = f"ns-{tmp_path.name}"
    with pytest.raises(StoreError, match=r"store\.db.*not a SQLite file"):
        create_store("store", namespace, f"sqlite:///{path}")
    path.unlink()
    asyncio.run(create_store("store", namespace, f"sqlite:///{path}").shutdown())


def test_a_file_damaged_between_two_lives_is_a_store_error_and_can_be_mended(
    store: LightningStore, tmp_path: Path
) -> None:
    async def found(rollout_id: str) -> Any:
        for _ in range(900):
            try:
                return await store.get_rollout_by_id(rollout_id)
            except StoreError:  # it tries to open the file again every two seconds
                await asyncio.sleep(0.1)
        return None

    rollout = asyncio.run(store.enqueue_rollout("kept"))
    kill_9(store._transport.handle)
    good = {path: path.read_bytes() for path in tmp_path.glob("store.db*")}
    for path in good:
        path.unlink()
    with pytest.raises(StoreError, match="gone now"):
        asyncio.run(store.ping())
    assert not (tmp_path / "store.db").exists()
    for path, content in good.items():
        path.write_bytes(content)
    assert asyncio.run(found(rollout.rollout_id)).input == "kept"
