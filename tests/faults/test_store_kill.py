"""kill -9 of the real store actor under load, 20 times: everything acknowledged is there, nothing is there twice.

Over the default file, and over a real PostgreSQL server (tests/services.py).
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from actors.store import Store, create_store
from agl_ray.spans import span_batch
from agl_ray.store import LightningStore
from agl_ray.store.journals.settings import JournalSettings
from agl_ray.store.transport import ActorTransport
from agl_ray.types import EndReason, EnqueueRolloutRequest, RolloutConfig, RolloutStatus

KILLS = 20
ROLLOUTS_PER_ROUND = 60
WORKERS = 6
SPANS = 4  # calls per attempt

pytest_plugins = ["services"]
pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, JournalSettings]:
    """(url, settings) of a journal that holds nothing yet."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/store.db", JournalSettings()
    url = request.getfixturevalue("postgres_url")
    return url, JournalSettings(run_id=request.getfixturevalue("run_id"))


class Seen:
    """What the store has acknowledged to its clients."""

    def __init__(self) -> None:
        self.rollouts: dict[str, Any] = {}
        self.spans: dict[str, tuple[str, str, int]] = {}  # span id -> rollout, attempt, sequence
        self.ends: dict[tuple[str, str], tuple[EndReason, float | None]] = {}
        self.leases: list[tuple[str, str]] = []
        self.state: dict[str, bytes] = {}


def one_span(key: tuple[str, str], span_id: str) -> Any:
    row = {"rollout_id": key[0], "attempt_id": key[1], "span_id": span_id, "name": "n"}
    row |= {
        "kind": "span",
        "start_ns": 1,
        "end_ns": 2,
        "status": "OK",
        "attributes": {"x": "y" * 200},
    }
    return span_batch([row])


async def enqueue(store: LightningStore, seen: Seen, number: int, filled: asyncio.Event) -> None:
    for first in range(0, number, 10):
        requests = [EnqueueRolloutRequest(input={"i": first + i}) for i in range(10)]
        for rollout in await store.enqueue_many_rollouts(requests):
            seen.rollouts[rollout.rollout_id] = rollout.input
        await asyncio.sleep(0.01)
    filled.set()


async def work(
    store: LightningStore, seen: Seen, worker: str, rng: random.Random, filled: asyncio.Event
) -> None:
    """Until nothing waits any more; `filled`: nothing will be enqueued."""
    while True:
        last = filled.is_set()
        taken = await store.dequeue_many_rollouts(limit=3, worker_id=worker, wait_seconds=1.0)
        if last and not taken:
            return
        await asyncio.gather(*(attempt(store, seen, one, rng) for one in taken))
        name = f"{worker}/{len(seen.leases)}"
        await store.put_state(name, name.encode())
        seen.state[name] = name.encode()


async def attempt(store: LightningStore, seen: Seen, taken: Any, rng: random.Random) -> None:
    key = (taken.rollout_id, taken.attempt_id)
    seen.leases.append(key)

    async def span(number: int) -> None:
        span_id = f"{key[1]}-{number}"
        (sequence,) = await store.add_spans(*key, one_span(key, span_id))
        assert span_id not in seen.spans
        seen.spans[span_id] = (*key, sequence)

    await asyncio.gather(*(span(number) for number in range(SPANS)))
    reward = rng.random()
    ended = await store.end_attempt(*key, EndReason.OK, reward=reward, expected_spans=SPANS)
    assert ended.end_reason is EndReason.OK
    seen.ends[key] = (EndReason.OK, reward)


async def kill_often(store: LightningStore, finished: asyncio.Event, rng: random.Random) -> int:
    handle = store._transport.handle  # type: ignore[attr-defined]
    kills = 0
    while kills < KILLS:
        await asyncio.sleep(rng.uniform(0.05, 0.4))
        await store.ping()
        os.kill(await handle.pid.remote(), 9)
        kills += 1
    finished.set()
    return kills


@pytest.mark.slow
def test_kill_9_loses_nothing_acknowledged_and_repeats_nothing(
    place: tuple[str, JournalSettings], tmp_path: Path
) -> None:
    rng = random.Random(7)
    seen = Seen()
    namespace, (url, settings) = f"ns-{tmp_path.name}", place

    async def main(store: LightningStore) -> None:
        finished = asyncio.Event()
        killing = asyncio.create_task(kill_often(store, finished, rng))
        while not finished.is_set():
            filled = asyncio.Event()
            workers = [work(store, seen, f"w{i}", rng, filled) for i in range(WORKERS)]
            await asyncio.gather(enqueue(store, seen, ROLLOUTS_PER_ROUND, filled), *workers)
        assert await killing == KILLS
        assert (await store.statistics())["restarts"] == KILLS
        await check(store, seen)

    store = create_store("store", namespace, url, settings=settings)
    asyncio.run(main(store))
    asyncio.run(store.shutdown())
    again = create_store(
        "store", namespace, url, settings=settings
    )  # and once more from the closed journal
    asyncio.run(check(again, seen))
    asyncio.run(again.shutdown())


COMMANDS = ("enqueue", "dequeue", "add_spans", "end_attempt", "put_state")


def dying_store(namespace: str, url: str, folder: str) -> LightningStore:
    """A store that dies once per command in COMMANDS, each time after the commit and before the answer."""
    import ray

    class DyingStore(Store):
        async def call(self, command: str, *arguments: Any) -> Any:
            answer = await super().call(command, *arguments)
            if command in COMMANDS and answer != [] and first_time(f"{folder}/{command}"):
                os.kill(os.getpid(), 9)
            return answer

    def first_time(mark: str) -> bool:
        try:
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    options = {"name": "store", "namespace": namespace, "num_cpus": 0, "max_restarts": -1}
    actor = ray.remote(DyingStore).options(**options, max_concurrency=1000).remote(url)
    return LightningStore(ActorTransport(actor, "store", namespace))


def test_an_answer_lost_after_its_commit_is_given_again(tmp_path: Path) -> None:
    seen = Seen()

    async def main() -> None:
        store = dying_store(f"ns-{tmp_path.name}", f"sqlite:///{tmp_path}/store.db", str(tmp_path))
        filled = asyncio.Event()
        workers = [work(store, seen, f"w{i}", random.Random(i), filled) for i in range(WORKERS)]
        await asyncio.gather(enqueue(store, seen, ROLLOUTS_PER_ROUND, filled), *workers)
        assert (await store.statistics())["restarts"] == len(COMMANDS)
        await check(store, seen)
        await store.shutdown()

    asyncio.run(main())


async def check(store: LightningStore, seen: Seen) -> None:
    rollouts = {one.rollout_id: one for one in await store.query_rollouts()}
    assert {name: one.input for name, one in rollouts.items()} == seen.rollouts
    assert max(Counter(seen.leases).values()) == 1
    assert {one.status for one in rollouts.values()} == {RolloutStatus.SUCCEEDED}
    attempts = {
        (name, one.attempt_id): one for name in rollouts for one in await store.query_attempts(name)
    }
    # A lease whose answer was lost is found again by its request id: one attempt per rollout, none left behind.
    assert sorted(attempts) == sorted(seen.leases)
    assert {key: (one.end_reason, one.reward) for key, one in attempts.items()} == seen.ends
    table = await store.read_spans(list(attempts))
    stored = list(
        zip(
            table["span_id"].to_pylist(),
            table["rollout_id"].to_pylist(),
            table["attempt_id"].to_pylist(),
            table["sequence_id"].to_pylist(),
            strict=True,
        )
    )
    assert len(stored) == len(seen.spans)
    assert {span: tuple(rest) for span, *rest in stored} == seen.spans
    for name in seen.state:
        assert await store.get_state(name) == seen.state[name]
    counts = await store.statistics()
    assert counts["spans"] == len(seen.spans)
    assert counts["attempts_by_reason"]["ok"] == len(seen.ends)


def test_a_silent_worker_loses_its_lease_and_its_rollout_is_run_again(tmp_path: Path) -> None:
    async def main(store: LightningStore) -> None:
        many = RolloutConfig(max_attempts=100, retry_condition=("lost",))
        rollout = await store.enqueue_rollout("x", config=many)
        silent = await store.dequeue_rollout("silent")
        living = await store.dequeue_rollout("living", wait_seconds=60)
        assert living.rollout_id == silent.rollout_id == rollout.rollout_id
        late = await store.end_attempt(
            silent.rollout_id, silent.attempt_id, EndReason.OK, reward=1.0
        )
        assert late.end_reason is EndReason.LOST
        while True:  # a machine that stands still makes a living one silent, too
            key = (living.rollout_id, living.attempt_id)
            ended = await store.end_attempt(*key, EndReason.OK, reward=0.5)
            if ended.end_reason is EndReason.OK:
                break
            living = await store.dequeue_rollout("living", wait_seconds=60)
        (final,) = await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=60)
        assert final.status is RolloutStatus.SUCCEEDED
        assert (await store.get_latest_attempt(rollout.rollout_id)).reward == 0.5

    store = create_store("store", f"ns-{tmp_path.name}", "memory://", lease_seconds=0.2)
    asyncio.run(main(store))
    asyncio.run(store.shutdown())


def test_work_goes_on_over_a_restart_without_losing_leases(tmp_path: Path) -> None:
    """The store is away for longer than the lease; the runner that heartbeats keeps its attempt."""

    async def main(store: LightningStore) -> None:
        for _ in range(10):  # it is lost where the machine stands still while the store is there
            taken = await store.start_rollout("x", worker_id="w")
            key = (taken.rollout_id, taken.attempt_id)
            pid = await store._transport.handle.pid.remote()  # type: ignore[attr-defined]
            os.kill(pid, 9)
            await asyncio.sleep(1.0)
            await store.update_worker("w", attempts=[key])
            ended = await store.end_attempt(*key, EndReason.OK, reward=1.0)
            if ended.end_reason is EndReason.OK:
                return
        raise AssertionError("no attempt outlived a restart")

    url = f"sqlite:///{tmp_path}/store.db"
    store = create_store("store", f"ns-{tmp_path.name}", url, lease_seconds=0.9)
    asyncio.run(main(store))
    asyncio.run(store.shutdown())
