"""Memory is bounded and history costs nothing: records leave, come back when they are named, and a restart reads what is open."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import sqlite3
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from agl_ray.store.core import StoreCore
from agl_ray.store.journals.base import Condition, Query
from agl_ray.store.journals.memory import MemoryJournal
from agl_ray.types import (
    LLM,
    AttemptedRollout,
    Conflict,
    EndReason,
    EnqueueRolloutRequest,
    InputError,
    NotFound,
    RolloutStatus,
    StoreError,
)

FEW = 0.016  # MiB: about four rollouts


class CountingJournal(MemoryJournal):
    """Counts what is read of records."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[str] = []
        self.questions = 0

    async def rows(self, kind: str, keys: Any) -> Any:
        self.questions += 1
        await asyncio.sleep(0)
        found = await super().rows(kind, keys)
        self.read += [row.key for row in found]
        return found


async def opened(journal: Any, memory_mib: float = FEW) -> StoreCore:
    core = StoreCore(
        "test://",
        journal,
        lease_seconds=30.0,
        memory_mib=memory_mib,
        cache_mib=0.0,
        span_seconds=5.0,
    )
    await core._start(must_exist=False)
    return core


def run(
    scenario: Callable[[StoreCore, CountingJournal], Awaitable[None]], memory_mib: float = FEW
) -> None:
    async def main() -> None:
        journal = CountingJournal()
        core = await opened(journal, memory_mib)
        try:
            await scenario(core, journal)
        finally:
            await core.close()

    asyncio.run(main())


def request(name: str, **more: Any) -> EnqueueRolloutRequest:
    return EnqueueRolloutRequest(input={"x": "y" * 200}, rollout_id=name, **more)


async def done(core: StoreCore, number: int, prefix: str = "ro") -> list[str]:
    """Rollouts that succeeded with a batch of spans each."""
    names = [f"{prefix}-{i}" for i in range(number)]
    for start in range(0, number, 500):
        await core.enqueue([request(name) for name in names[start : start + 500]])
        taken = await core.dequeue(500, "w", 0.0, f"rq-{prefix}-{start}")
        await core.add_spans([(*ids(one), "b", 2, b"spans") for one in taken])
        await asyncio.gather(*(core.end_attempt(*ids(one), EndReason.OK, 1.0) for one in taken))
    return names


def ids(one: AttemptedRollout) -> tuple[str, str]:
    return (one.rollout_id, one.attempt_id)


def held(core: StoreCore) -> int:
    return len(core.machine.state.residents)


def test_final_and_waiting_rollouts_leave_memory_and_open_ones_stay() -> None:
    async def scenario(core: StoreCore, journal: CountingJournal) -> None:
        await done(core, 50)
        assert held(core) <= 5
        await core.enqueue([request(f"wait-{i}") for i in range(50)])
        assert held(core) <= 12
        assert len(core.machine.state.queue) == 50
        taken = await core.dequeue(20, "w", 0.0, "rq")
        assert [one.rollout_id for one in taken] == [f"wait-{i}" for i in range(20)]
        assert 20 <= held(core) <= 32
        assert (await core.statistics())["rollouts"] == 100

    run(scenario)


def test_commands_on_what_has_left_memory() -> None:
    async def scenario(core: StoreCore, journal: CountingJournal) -> None:
        names = await done(core, 50)
        first = names[0]
        assert first not in core.machine.state.rollouts
        (known,) = await core.enqueue([request(first)])
        assert known.status is RolloutStatus.SUCCEEDED
        with pytest.raises(Conflict, match="another input"):
            await core.enqueue([EnqueueRolloutRequest(input="other", rollout_id=names[1])])
        with pytest.raises(Conflict, match="exists"):
            await core.start_rollout(request(names[2]), None, "rq-2")
        with pytest.raises(Conflict, match="requeue"):
            await core.start_attempt(names[3], None, "rq-3")
        attempt = await core.get_latest_attempt(names[4])
        assert attempt is not None
        key = (names[4], attempt.attempt_id)
        assert attempt.num_spans == 2
        again = await core.end_attempt(*key, EndReason.OK, 1.0, None, 2)
        assert again == attempt
        with pytest.raises(Conflict, match="already ended"):
            await core.end_attempt(*key, EndReason.AGENT_ERROR)
        late = await core.add_spans([(*key, "b", 2, b"spans"), (*key, "late", 3, b"later")])
        assert late == [(1, 2), (3, 3)]
        assert (await core.read_spans([key])).places == [(1, 2, 5), (3, 3, 5)]
        assert (await core.get_attempt(*key)).num_spans == 5
        again = await core.update_rollout(names[5], {"status": RolloutStatus.REQUEUING})
        assert again.status is RolloutStatus.REQUEUING
        (taken,) = await core.dequeue(1, "w", 0.0, "rq-4")
        assert (taken.rollout_id, taken.attempt.sequence_id) == (names[5], 2)
        assert (await core.cancel_rollouts([names[6]]))[0].status is RolloutStatus.SUCCEEDED
        with pytest.raises(NotFound):
            await core.cancel_rollouts([names[7], "ro-unknown"])

    run(scenario)


def test_waits_over_what_has_left_memory() -> None:
    async def scenario(core: StoreCore, journal: CountingJournal) -> None:
        names = await done(core, 30)
        waiting = [f"wait-{i}" for i in range(30)]
        await core.enqueue([request(name) for name in waiting])
        found, enough = await core.wait_for_rollouts([*names, *waiting, "ro-unknown"], 0.0, 30)
        assert enough
        assert [one.rollout_id for one in found] == names
        everybody = asyncio.create_task(core.wait_for_rollouts(names + waiting, None, None))
        while (taken := await core.dequeue(7, "w", 0.0, None)) != []:
            for one in taken:
                await core.end_attempt(*ids(one), EndReason.OK, 0.0)
        found, enough = await everybody
        assert enough
        assert [one.rollout_id for one in found] == names + waiting

    run(scenario)


def test_a_crowd_shares_one_question() -> None:
    async def scenario(core: StoreCore, journal: CountingJournal) -> None:
        names = await done(core, 50)
        before = journal.questions
        found = await asyncio.gather(*(core.get_latest_attempt(name) for name in names[:40]))
        assert all(one is not None and one.num_spans == 2 for one in found)
        assert journal.questions - before <= 2
        before = journal.questions
        with pytest.raises(InputError):
            await core.enqueue([EnqueueRolloutRequest(input=1, rollout_id="not / an id")])
        assert await core.get_rollout("not / an id") is None
        assert journal.questions == before

    run(scenario)


def test_a_caller_that_leaves_during_a_read_leaves_nothing_behind() -> None:
    async def scenario(core: StoreCore, journal: CountingJournal) -> None:
        names = await done(core, 50)
        tasks = [asyncio.create_task(core.get_latest_attempt(name)) for name in names[:30]]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (await core.get_latest_attempt(names[-1])) is not None
        assert core.machine.state.residents._pins == {}
        assert held(core) <= 5

    run(scenario)


def test_resources_and_state_leave_memory_too() -> None:
    async def scenario(core: StoreCore, journal: CountingJournal) -> None:
        for i in range(30):
            llm = LLM(endpoint=f"http://{i}", model="m" * 1000)
            await core.add_resources(f"rs-{i}", {"main": llm})
            await core.put_state(f"key/{i}", bytes([i]) * 2000)
        assert held(core) <= 12
        latest = await core.get_resources(None)
        assert latest is not None
        assert latest.resources_id == "rs-29"
        known = await core.get_resources("rs-3")
        assert known is not None
        assert await core.add_resources("rs-3", known.resources) == known
        assert (await core.update_resources("rs-3", known.resources)).version == 2
        assert await core.get_resources("rs-none") is None
        rollout = (await core.enqueue([request("ro", resources_id="rs-4")]))[0]
        assert rollout.resources_id == "rs-4"
        whole = await core.get_rollout_in_full("ro")
        assert whole is not None
        assert whole[2] is not None
        assert whole[2].resources_id == "rs-4"
        with pytest.raises(NotFound, match="rs-none"):
            await core.enqueue([request("ro-2", resources_id="rs-none")])
        with pytest.raises(NotFound, match="rs-none"):
            await core.update_rollout("ro", {"resources_id": "rs-none"})
        assert await core.get_state("key/7") == bytes([7]) * 2000
        assert await core.get_state("key/none") is None
        assert len(await core.list_state("key/")) == 30
        found, total = await core.find_resources(
            Query("resources", order_by="create_time", limit=2, count=True)
        )
        assert [one.resources_id for one in found] == ["rs-0", "rs-1"]
        assert total == 30

    run(scenario)


def test_lists_are_the_journals_with_what_it_is_not_told() -> None:
    async def scenario(core: StoreCore, journal: CountingJournal) -> None:
        names = await done(core, 20)
        (attempted,) = [await core.start_rollout(request("open"), "w", "rq")]
        await core.add_spans([(*ids(attempted), "b", 4, b"spans")])
        query = Query("rollout", order_by="created", descending=True, limit=3, count=True)
        found, total = await core.find_rollouts(query)
        assert [one.rollout_id for one in found] == ["open", names[-1], names[-2]]
        assert total == 21
        status = Condition("status", ("succeeded", "failed"))
        found, total = await core.find_rollouts(query._replace(must=(status,)))
        assert ([one.rollout_id for one in found][:1], total) == ([names[-1]], 20)
        attempts, total = await core.find_attempts(Query("attempt", count=True))
        assert sorted(one.num_spans for one in attempts) == [2] * 20 + [4]
        now = await core.get_attempt(*ids(attempted))
        assert next(one for one in attempts if one.attempt_id == now.attempt_id) == now

    run(scenario)


def test_forgotten_rollouts_are_gone_and_their_ids_free() -> None:
    async def scenario(core: StoreCore, journal: CountingJournal) -> None:
        names = await done(core, 20)
        await core.enqueue([request("waits")])
        with pytest.raises(Conflict, match="'waits' is queuing"):
            await core.forget([names[0], "waits"])
        attempt = await core.get_latest_attempt(names[0])
        assert attempt is not None
        await core.forget([*names[:10], "ro-unknown"])
        await core.forget(names[:10])  # a repeated call
        counts = await core.statistics()
        assert (counts["rollouts"], counts["attempts"], counts["spans"]) == (11, 10, 20)
        assert counts["span_bytes"] == 50
        assert await core.get_rollout(names[0]) is None
        with pytest.raises(NotFound):
            await core.read_spans([(names[0], attempt.attempt_id)])
        again, made = await asyncio.gather(
            core.forget([names[10]]), core.enqueue([request(names[10])])
        )
        assert again is None
        assert made[0].status is RolloutStatus.QUEUING
        assert made[0].num_attempts == 0

    run(scenario)


@pytest.mark.parametrize(
    ("memory_mib", "number"),
    [(FEW, 500), (64.0, 500), pytest.param(FEW, 20_000, marks=pytest.mark.slow)],
)
def test_a_restart_reads_what_is_open_and_none_of_the_history(
    memory_mib: float, number: int
) -> None:
    async def main() -> None:
        journal = CountingJournal()
        core = await opened(journal, memory_mib)
        await done(core, number)
        await core.enqueue([request(f"wait-{i}") for i in range(10)])
        attempted = await core.start_rollout(request("open"), "w", "rq")
        await core.add_spans([(*ids(attempted), "b", 4, b"spans")])
        before = await core.statistics()
        await core.close()
        journal.read.clear()
        core = await opened(journal, memory_mib)
        assert journal.read == ["open"]
        assert set(core.machine.state.rollouts) == {"open"}
        after = await core.statistics()
        for name in ("rollouts", "rollouts_by_status", "attempts", "spans", "queue", "resources"):
            assert after[name] == before[name], name
        assert await core.add_spans([(*ids(attempted), "b", 4, b"spans")]) == [(1, 4)]
        taken = await core.dequeue(2, "w", 0.0, None)
        assert [one.rollout_id for one in taken] == ["wait-0", "wait-1"]
        (new,) = await core.enqueue([request("new")])
        found, _ = await core.find_rollouts(
            Query("rollout", order_by="created", descending=True, limit=2)
        )
        assert [one.rollout_id for one in found] == [new.rollout_id, "open"]
        await core.close()

    asyncio.run(main())


def test_a_damaged_record_hurts_those_who_name_it_and_no_others(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/store.db"

    async def before() -> None:
        core = await StoreCore.open(url)
        await done(core, 10)
        await core.close()

    async def after() -> None:
        core = await StoreCore.open(url)
        answers = await asyncio.gather(
            *(core.get_latest_attempt(f"ro-{i}") for i in range(10)), return_exceptions=True
        )
        assert [i for i, one in enumerate(answers) if isinstance(one, Exception)] == [5]
        with pytest.raises(StoreError, match=r"'ro-5' of table 'rollout' is damaged"):
            await core.get_rollout("ro-5")
        assert core.failure is None
        await core.close()

    asyncio.run(before())
    with sqlite3.connect(tmp_path / "store.db") as connection:
        connection.execute("UPDATE rollout SET body = x'7b7d' WHERE key = 'ro-5'")
    connection.close()
    asyncio.run(after())


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def sizes_along(folder: str, memory_mib: float, parts: int) -> list[tuple[int, int]]:
    """(resident bytes, weighed bytes) after each 5000 rollouts, in a process that has done nothing else."""

    async def main() -> list[tuple[int, int]]:
        url = f"sqlite:///{folder}/store.db"
        core = await StoreCore.open(url, memory_mib=memory_mib, cache_mib=1)
        sizes = []
        for part in range(parts):
            await done(core, 5000, f"part-{part}")
            sizes.append((resident_bytes(), core.machine.state.residents.size))
        await core.close()
        return sizes

    return asyncio.run(main())


def alone(*arguments: Any) -> list[tuple[int, int]]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(sizes_along, *arguments).result()


@pytest.mark.slow
def test_memory_stays_flat_over_many_rollouts(tmp_path: Path) -> None:
    """Resident memory after 20k rollouts is that after the first 5k."""
    sizes = alone(str(tmp_path), 4, 4)
    assert sizes[-1][0] - sizes[0][0] < 8 * 2**20, sizes
    assert max(weighed for _, weighed in sizes) <= 4 * 2**20


@pytest.mark.slow
def test_records_weigh_what_they_are_taken_for(tmp_path: Path) -> None:
    """The estimate that bounds memory is near what the process grows by."""
    (before, first), *_, (after, last) = alone(str(tmp_path), 4096, 3)
    assert 0.6 < (after - before) / (last - first) < 1.4, (after - before, last - first)
