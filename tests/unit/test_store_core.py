"""The core and its client in one process: journal before acknowledge, conditions, restarts, failures."""

from __future__ import annotations

import asyncio
import pickle
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from agl_ray.spans import SPAN_SCHEMA, span_batch
from agl_ray.store import LightningStore, StoreCore, base
from agl_ray.store.journals.sqlite import SqliteJournal
from agl_ray.types import (
    LLM,
    AttemptStatus,
    Conflict,
    EndReason,
    EnqueueRolloutRequest,
    InputError,
    NotFound,
    RolloutConfig,
    RolloutStatus,
    StoreError,
)

Scenario = Callable[[LightningStore], Awaitable[None]]


def run(scenario: Scenario, url: str = "memory://", **options: float) -> None:
    async def main() -> None:
        core = await StoreCore.open(url, **options)
        try:
            await scenario(LightningStore.local(core))
        finally:
            await core.close()

    asyncio.run(main())


def spans(attempt, *names: str):
    return span_batch(
        [
            {
                "rollout_id": attempt.rollout_id,
                "attempt_id": attempt.attempt_id,
                "span_id": name,
                "name": name,
                "kind": "span",
                "start_ns": 1,
                "end_ns": 2,
                "status": "OK",
                "attributes": {"n": 1},
            }
            for name in names
        ]
    )


async def add(store: LightningStore, attempt, *names: str, batch_id: str | None = None):
    batch = spans(attempt, *names)
    return await store.add_spans(attempt.rollout_id, attempt.attempt_id, batch, batch_id)


def ids(attempt) -> tuple[str, str]:
    return (attempt.rollout_id, attempt.attempt_id)


async def turn(number: int = 20) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


def test_the_life_of_a_rollout() -> None:
    async def scenario(store: LightningStore) -> None:
        snapshot = await store.add_resources({"main": LLM(endpoint="http://x", model="m")})
        assert await store.get_latest_resources() == snapshot
        rollout = await store.enqueue_rollout({"q": (1, 2)}, mode="train", metadata={"row": 3})
        assert rollout.input == {"q": [1, 2]}
        assert rollout.resources_id == snapshot.resources_id
        attempt = await store.dequeue_rollout("w")
        assert attempt is not None
        assert attempt.attempt.status is AttemptStatus.PREPARING
        assert await add(store, attempt, "a", "b") == [1, 2]
        assert (await store.get_attempt(*ids(attempt))).status is AttemptStatus.RUNNING
        ended = await store.end_attempt(*ids(attempt), EndReason.OK, reward=1.0, expected_spans=2)
        assert (ended.reward, ended.num_spans) == (1.0, 2)
        (final,) = await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id])
        assert final.status is RolloutStatus.SUCCEEDED
        assert await store.get_latest_attempt(rollout.rollout_id) == ended
        assert [one.name for one in await store.query_spans(rollout.rollout_id, "latest")] == [
            "a",
            "b",
        ]
        counts = await store.statistics()
        assert counts["rollouts_by_status"]["succeeded"] == counts["attempts_by_reason"]["ok"] == 1
        assert counts["spans"] == 2

    run(scenario)


def test_blocking_dequeue_wakes_when_work_comes() -> None:
    async def scenario(store: LightningStore) -> None:
        takers = [
            asyncio.create_task(store.dequeue_rollout(f"w{i}", wait_seconds=3600)) for i in range(3)
        ]
        await turn()
        rollouts = await store.enqueue_many_rollouts(
            [EnqueueRolloutRequest(input=i) for i in (0, 1)]
        )
        attempt, other = await takers[0], await takers[1]
        assert [attempt.rollout_id, other.rollout_id] == [one.rollout_id for one in rollouts]
        last = takers[2]
        await store.update_rollout(attempt.rollout_id, metadata={"x": 1})
        assert not last.done()
        await store.worker_lost("w0", "killed")
        again = await last
        assert (again.rollout_id, again.attempt.sequence_id) == (attempt.rollout_id, 2)

    run(scenario)


def test_dequeue_returns_empty_handed_after_its_time() -> None:
    async def scenario(store: LightningStore) -> None:
        assert await store.dequeue_rollout(wait_seconds=0.01) is None
        assert await store.dequeue_many_rollouts(limit=0, wait_seconds=3600) == []

    run(scenario)


def test_a_dead_worker_waiting_for_work_gets_none() -> None:
    async def scenario(store: LightningStore) -> None:
        dead = asyncio.create_task(store.dequeue_rollout("dead", wait_seconds=15))
        await turn()
        await store.worker_lost("dead", "its process died")
        assert await dead is None

    run(scenario)


def test_wait_for_rollouts_is_a_condition() -> None:
    async def scenario(store: LightningStore) -> None:
        queued = await store.enqueue_many_rollouts(
            [EnqueueRolloutRequest(input=i) for i in range(3)]
        )
        names = [one.rollout_id for one in queued]
        everyone = asyncio.create_task(store.wait_for_rollouts(rollout_ids=[*names, "ro-unknown"]))
        two = asyncio.create_task(store.wait_for_rollouts(rollout_ids=names, min_count=2))
        assert await store.wait_for_rollouts(rollout_ids=names, timeout=0) == []
        attempts = await store.dequeue_many_rollouts(limit=3)
        await store.end_attempt(*ids(attempts[2]), EndReason.OK, reward=0.0)
        assert [
            one.rollout_id for one in await store.wait_for_rollouts(rollout_ids=names, timeout=0.01)
        ] == [names[2]]
        assert not two.done()
        await store.cancel_rollouts([names[0]])
        assert [one.rollout_id for one in await two] == [names[0], names[2]]
        assert not everyone.done()
        await store.end_attempt(*ids(attempts[1]), EndReason.AGENT_ERROR, error="it raised")
        assert [one.rollout_id for one in await everyone] == names

    run(scenario)


def test_repeated_batches_are_stored_once_also_after_the_end(tmp_path: Path) -> None:
    async def scenario(store: LightningStore) -> None:
        attempt = await store.start_rollout(1)
        answers = await asyncio.gather(
            *(add(store, attempt, "a", batch_id="b1") for _ in range(5)),
            add(store, attempt, "b", batch_id="b2"),
        )
        assert answers == [[1]] * 5 + [[2]]
        await store.end_attempt(*ids(attempt), EndReason.OK, reward=1.0)
        late = await asyncio.gather(
            *(add(store, attempt, "c", batch_id="b3") for _ in range(5)),
            add(store, attempt, "a", batch_id="b1"),
        )
        assert late == [[3]] * 5 + [[1]]
        table = await store.read_spans([ids(attempt)])
        assert table["name"].to_pylist() == ["a", "b", "c"]
        assert (await store.get_attempt(*ids(attempt))).num_spans == 3

    run(scenario, f"sqlite:///{tmp_path}/store.db")
    run(scenario)


def test_one_bad_batch_does_not_hurt_its_neighbours() -> None:
    async def scenario(store: LightningStore) -> None:
        good = await store.start_rollout(1)
        unknown = good.__class__(
            rollout=good.rollout,
            attempt=good.attempt.__class__(
                rollout_id=good.rollout_id, attempt_id="at-x", sequence_id=1, start_time=0.0
            ),
        )
        first, second, third = await asyncio.gather(
            add(store, good, "a"),
            add(store, unknown, "b"),
            add(store, good, "c"),
            return_exceptions=True,
        )
        assert isinstance(second, NotFound)
        assert (first, third) == ([1], [2])

    run(scenario)


@pytest.mark.parametrize("cache_mib", [0.0, 64.0])
def test_spans_come_back_in_the_asked_order(tmp_path: Path, cache_mib: float) -> None:
    async def scenario(store: LightningStore) -> None:
        one, two = await store.start_rollout(1), await store.start_rollout(2)
        for name in "abc":
            await add(store, one, name)
            await add(store, two, name.upper(), name.upper() * 2)
        table = await store.read_spans([ids(two), ids(one)])
        assert table.schema.equals(SPAN_SCHEMA)
        assert table["name"].to_pylist() == ["A", "AA", "B", "BB", "C", "CC", "a", "b", "c"]
        assert table["sequence_id"].to_pylist() == [1, 2, 3, 4, 5, 6, 1, 2, 3]
        assert (await store.read_spans([])).num_rows == 0
        with pytest.raises(NotFound):
            await store.read_spans([("ro", "at")])

    run(scenario, f"sqlite:///{tmp_path}/store.db", cache_mib=cache_mib)


def test_an_ok_end_waits_for_its_stragglers_and_is_lost_without_them() -> None:
    async def scenario(store: LightningStore) -> None:
        attempt = await store.start_rollout(1)
        ending = asyncio.create_task(
            store.end_attempt(*ids(attempt), EndReason.OK, reward=1.0, expected_spans=2)
        )
        await add(store, attempt, "a")
        assert not ending.done()
        await add(store, attempt, "b")
        assert (await ending).end_reason is EndReason.OK

    async def missing(store: LightningStore) -> None:
        attempt = await store.start_rollout(1)
        ended = await store.end_attempt(*ids(attempt), EndReason.OK, reward=1.0, expected_spans=2)
        assert ended.end_reason is EndReason.LOST
        assert ended.reward is None
        assert "0 of the attempt's 2 spans" in (ended.error or "")
        assert (await store.get_rollout_by_id(attempt.rollout_id)).status is RolloutStatus.REQUEUING

    run(scenario, span_seconds=3600.0)
    run(missing, span_seconds=0.01)


def test_the_clock_ends_what_is_past_its_lease_without_traffic() -> None:
    async def scenario(store: LightningStore) -> None:
        rollout = await store.enqueue_rollout(1)
        await store.dequeue_rollout("silent")
        again = await store.dequeue_rollout("other", wait_seconds=60)
        assert (again.rollout_id, again.attempt.sequence_id) == (rollout.rollout_id, 2)
        first = (await store.query_attempts(rollout.rollout_id))[0]
        assert first.end_reason is EndReason.LOST
        assert first.end_time is not None
        (failed,) = await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=60)
        assert failed.status is RolloutStatus.FAILED

    run(scenario, lease_seconds=0.05)


def test_a_restart_restores_everything_acknowledged(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/store.db"
    seen: dict[str, object] = {}

    async def before(store: LightningStore) -> None:
        await store.add_resources({"main": LLM(endpoint="http://a", model="m")})
        await store.add_resources({"main": LLM(endpoint="http://b", model="m")})
        config = RolloutConfig(max_attempts=3, retry_condition=(AttemptStatus.FAILED,))
        for i in range(6):
            await store.enqueue_rollout({"i": i}, config=config)
        done, failed, open_, _ = await store.dequeue_many_rollouts(limit=4, worker_id="w")
        await add(store, done, "a", "b", batch_id="b1")
        await add(store, open_, "c", batch_id="b2")
        await store.end_attempt(*ids(done), EndReason.OK, reward=0.5)
        await store.end_attempt(*ids(failed), EndReason.ENGINE_ERROR, error="it vanished")
        await store.put_state("controller/position", b"\x00step 3")
        await store.put_state("other", b"")
        await add(store, done, "late", batch_id="b3")
        seen.update(await everything(store), done=done, open=open_, failed=failed)

    async def everything(store: LightningStore) -> dict[str, object]:
        rollouts = await store.query_rollouts()
        attempts = {one.rollout_id: await store.query_attempts(one.rollout_id) for one in rollouts}
        keys = [ids(one) for many in attempts.values() for one in many]
        counts = await store.statistics()
        return {
            "rollouts": [await store.get_rollout_by_id(one.rollout_id) for one in rollouts],
            "attempts": {
                name: [
                    one.__class__(
                        **{**asdict(one), "lease_until": None, "last_heartbeat_time": None}
                    )
                    for one in many
                ]
                for name, many in attempts.items()
            },
            "spans": (await store.read_spans(keys)).to_pylist(),
            "resources": await store.get_latest_resources(),
            "state": {key: await store.get_state(key) for key in await store.list_state("")},
            "workers": [(one.worker_id, one.status) for one in await store.query_workers()],
            "counts": {
                key: counts[key]
                for key in (
                    "rollouts_by_status",
                    "attempts_by_reason",
                    "attempts_open",
                    "queue",
                    "spans",
                    "span_bytes",
                )
            },
        }

    async def after(store: LightningStore) -> None:
        now = await everything(store)
        for name, value in now.items():
            assert value == seen[name], name
        open_, done, failed = seen["open"], seen["done"], seen["failed"]
        assert await add(store, open_, "c", batch_id="b2") == [1]
        assert await add(store, open_, "d", batch_id="b4") == [2]
        assert await add(store, done, "late", batch_id="b3") == [3]
        assert await add(store, done, "later", batch_id="b5") == [4]
        queued = await store.dequeue_many_rollouts(limit=10)
        assert [one.input["i"] for one in queued] == [4, 5, 1]
        assert queued[-1].attempt.sequence_id == failed.attempt.sequence_id + 1
        ended = await store.end_attempt(*ids(open_), EndReason.OK, reward=1.0, expected_spans=2)
        assert ended.end_reason is EndReason.OK
        assert (await store.statistics())["restarts"] == 1

    run(before, url)
    run(after, url)


def asdict(record) -> dict[str, object]:
    return {name: getattr(record, name) for name in record.__struct_fields__}


def test_open_attempts_get_a_fresh_lease_after_a_restart(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/store.db"

    async def before(store: LightningStore) -> None:
        await store.start_rollout(1, worker_id="w")

    async def after(store: LightningStore) -> None:
        (rollout,) = await store.query_rollouts()
        attempt = await store.get_latest_attempt(rollout.rollout_id)
        assert attempt.lease_until > attempt.start_time + 3000
        lost = await store.worker_lost("w", "it died while the store was away")
        assert [one.end_reason for one in lost] == [EndReason.LOST]

    run(before, url)
    run(after, url, lease_seconds=3600.0)


def test_nothing_is_shown_before_it_is_in_the_journal(tmp_path: Path) -> None:
    async def main() -> None:
        core = await StoreCore.open(f"sqlite:///{tmp_path}/store.db")
        store = LightningStore.local(core)
        attempt = await store.start_rollout(1)
        waiting = asyncio.create_task(store.wait_for_rollouts(rollout_ids=[attempt.rollout_id]))
        await turn()
        held = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
        held.execute("BEGIN IMMEDIATE")  # the store's writer waits for this lock
        ending = asyncio.create_task(store.end_attempt(*ids(attempt), EndReason.OK, reward=1.0))
        reading = asyncio.create_task(store.get_rollout_by_id(attempt.rollout_id))
        await asyncio.sleep(0.1)
        assert core.machine.state.rollouts[attempt.rollout_id].status is RolloutStatus.SUCCEEDED
        assert not any(task.done() for task in (waiting, ending, reading))
        held.execute("ROLLBACK")
        held.close()
        await ending
        assert (await reading).status is RolloutStatus.SUCCEEDED
        assert len(await waiting) == 1
        await core.close()

    asyncio.run(main())


def test_a_failed_commit_ends_the_core_and_the_journal_tells_the_truth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path}/store.db"

    async def main() -> None:
        core = await StoreCore.open(url)
        store = LightningStore.local(core)
        kept = await store.enqueue_rollout("kept")
        taker = asyncio.create_task(store.dequeue_many_rollouts(limit=1, wait_seconds=3600))
        taken = await taker
        waiting = asyncio.create_task(store.wait_for_rollouts(rollout_ids=[kept.rollout_id]))
        blocked = asyncio.create_task(store.dequeue_rollout(wait_seconds=3600))
        await turn()

        async def full(*_: object) -> None:
            raise StoreError("store journal x: cannot write it: disk is full")

        monkeypatch.setattr(core._journal, "write", full)
        with pytest.raises(StoreError, match="disk is full"):
            await add(store, taken[0], "lost")
        for task in (waiting, blocked):
            with pytest.raises(StoreError, match="disk is full"):
                await task
        with pytest.raises(StoreError, match="disk is full"):
            await store.get_rollout_by_id(kept.rollout_id)
        await core.close()

    async def after(store: LightningStore) -> None:
        assert [one.input for one in await store.query_rollouts()] == ["kept"]
        assert (await store.statistics())["spans"] == 0

    asyncio.run(main())
    run(after, url)


def test_disk_full_is_said_so(tmp_path: Path) -> None:
    async def main() -> None:
        core = await StoreCore.open(f"sqlite:///{tmp_path}/store.db")
        journal = core._journal
        assert isinstance(journal, SqliteJournal)
        assert journal._writer is not None
        pages = journal._writer.execute("PRAGMA page_count").fetchone()[0]
        journal._writer.execute(f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(StoreError, match="disk is full; free some space"):
            await LightningStore.local(core).put_state("big", b"x" * 100_000)
        await core.close()

    asyncio.run(main())


def test_a_store_that_stood_still_takes_no_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        core = await StoreCore.open("memory://", lease_seconds=30.0)
        store = LightningStore.local(core)
        attempt = await store.start_rollout(1)
        core._offset += 1000.0  # as if the loop had been blocked so long
        await asyncio.sleep(base.TICK_SECONDS * 2)
        now = await store.get_attempt(*ids(attempt))
        assert now.end_reason is None
        assert now.lease_until > core.now()
        await core.close()

    asyncio.run(main())


def test_bad_input_is_refused_by_name() -> None:
    async def scenario(store: LightningStore) -> None:
        with pytest.raises(InputError, match="input"):
            await store.enqueue_rollout(object())
        with pytest.raises(InputError, match="metadata"):
            await store.enqueue_rollout(1, metadata={"f": object()})
        with pytest.raises(NotFound, match="rs-none"):
            await store.enqueue_rollout(1, resources_id="rs-none")
        attempt = await store.start_rollout(1)
        with pytest.raises(InputError, match="finite"):
            await store.end_attempt(*ids(attempt), EndReason.OK, reward=float("nan"))
        await store.end_attempt(*ids(attempt), EndReason.OK, reward=1.0)
        with pytest.raises(Conflict):
            await store.end_attempt(*ids(attempt), EndReason.AGENT_ERROR)
        with pytest.raises(InputError, match="bytes"):
            await store.put_state("k", "text")  # type: ignore[arg-type]

    run(scenario)


def test_after_shutdown_calls_fail_and_blocked_ones_are_told() -> None:
    async def main() -> None:
        core = await StoreCore.open("memory://")
        store = LightningStore.local(core)
        blocked = asyncio.create_task(store.dequeue_rollout(wait_seconds=3600))
        await turn()
        await store.shutdown()
        with pytest.raises(StoreError, match="shut down"):
            await blocked
        with pytest.raises(StoreError, match="shut down"):
            await store.ping()

    asyncio.run(main())


def test_a_local_store_serves_other_loops_and_is_not_pickled() -> None:
    async def scenario(store: LightningStore) -> None:
        rollout = await asyncio.to_thread(lambda: asyncio.run(store.enqueue_rollout("x")))
        attempt = await store.dequeue_rollout()
        assert attempt.rollout_id == rollout.rollout_id
        added = await asyncio.to_thread(lambda: asyncio.run(add(store, attempt, "a")))
        assert added == [1]
        with pytest.raises(TypeError, match="one process"):
            pickle.dumps(store)

    run(scenario)


def test_queries() -> None:
    async def scenario(store: LightningStore) -> None:
        rows = [EnqueueRolloutRequest(input=i, mode="val" if i % 2 else "train") for i in range(6)]
        made = await store.enqueue_many_rollouts(rows)
        names = [one.rollout_id for one in made]
        await store.cancel_rollouts(names[:2])
        assert [one.input for one in await store.query_rollouts(mode="val")] == [1, 3, 5]
        queued = await store.query_rollouts(status_in=[RolloutStatus.QUEUING], limit=2, offset=1)
        assert [one.input for one in queued] == [3, 4]
        picked = await store.query_rollouts(rollout_id_in=[names[4], "ro-x", names[0]])
        assert [one.input for one in picked] == [0, 4]
        assert list(await store.query_rollouts(limit=0)) == []
        assert await store.get_attempts(names) == []
        assert await store.get_rollout_by_id("ro-x") is None
        assert await store.get_latest_attempt("ro-x") is None
        with pytest.raises(NotFound):
            await store.get_attempts(["ro-x"])

    run(scenario)
