"""Conditions inside the store: exactly those wake whose wait is over."""

from __future__ import annotations

import asyncio
import time

import pytest

from agl_ray.store import LightningStore
from agl_ray.store.core import StoreCore
from agl_ray.store.waiting import Backlog, FinalWaiters, QueueWaiters, SpanWaiters


async def started(*tasks: asyncio.Task) -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_takers_wake_in_order_of_arrival() -> None:
    async def main() -> None:
        waiters, woken = QueueWaiters(), []

        async def taker(name: str) -> None:
            await waiters.wait(name, 60)
            woken.append(name)

        tasks = [asyncio.create_task(taker(name)) for name in "abc"]
        await started(*tasks)
        waiters.wake(2)
        await started(*tasks)
        assert woken == ["a", "b"]
        assert len(waiters) == 1
        tasks[2].cancel()
        await started()
        assert len(waiters) == 0

    asyncio.run(main())


def test_a_cancelled_taker_hands_its_wake_on() -> None:
    async def main() -> None:
        waiters = QueueWaiters()
        first, second = (asyncio.create_task(waiters.wait(name, 60)) for name in "ab")
        await started(first, second)
        waiters.wake(1)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await started(second)
        assert second.done()

    asyncio.run(main())


def test_takers_of_a_dead_worker_are_sent_away() -> None:
    async def main() -> None:
        waiters = QueueWaiters()
        dead, alive = (asyncio.create_task(waiters.wait(name, 60)) for name in ("x", "y"))
        await started(dead, alive)
        waiters.drop_worker("x")
        assert await dead is False
        assert not alive.done()
        waiters.fail(RuntimeError("journal"))
        with pytest.raises(RuntimeError):
            await alive

    asyncio.run(main())


def test_final_waiters_count_to_their_need_and_leave_nothing_behind() -> None:
    async def main() -> None:
        waiters = FinalWaiters()
        both = asyncio.create_task(waiters.wait(["a", "b"], 2, None))
        either = asyncio.create_task(waiters.wait(["a", "b"], 1, None))
        timed = asyncio.create_task(waiters.wait(["c"], 1, 0.01))
        await started(both, either)
        waiters.final("b")
        await either
        assert not both.done()
        waiters.final("b")
        await started(both)
        assert not both.done()
        waiters.final("a")
        await both
        await timed
        assert waiters._of_rollout == {}

    asyncio.run(main())


def test_span_waiters() -> None:
    async def main() -> None:
        waiters = SpanWaiters()
        task = asyncio.create_task(waiters.wait(("r", "a"), 1, 4, 60))
        await started(task)
        waiters.arrived(("r", "a"), 2)
        waiters.arrived(("r", "b"), 9)
        await started(task)
        assert not task.done()
        waiters.arrived(("r", "a"), 1)
        await task
        assert waiters._of_attempt == {}

    asyncio.run(main())


def test_a_backlog_is_told_once_it_has_stood_without_a_break() -> None:
    async def main() -> None:
        backlog = Backlog()
        assert await backlog.wait(0.0, 0.01) == 0
        backlog.note(3)
        assert await backlog.wait(0.02, 60) == 3
        for scale in (1, 20, 200):
            begun = time.monotonic()
            broken = asyncio.create_task(backlog.wait(0.1 * scale, 0.14 * scale))
            await asyncio.sleep(0.05 * scale)
            in_time = time.monotonic() - begun < 0.1 * scale  # or the machine stood still: again
            backlog.note(0)
            backlog.note(2)
            found = await broken
            if in_time:
                break
        assert found == 0  # it stood from the break on for less
        late = asyncio.create_task(backlog.wait(0.01, 60))
        backlog.note(0)
        await started(late)
        backlog.note(7)
        assert await late == 7
        failing = asyncio.create_task(backlog.wait(60, 60))
        await started(failing)
        backlog.fail(ValueError("closed"))
        with pytest.raises(ValueError, match="closed"):
            await failing

    asyncio.run(main())


def test_whoever_sends_runners_hears_of_a_queue_that_stands() -> None:
    async def main() -> None:
        core = await StoreCore.open("memory://")
        store = LightningStore.local(core)
        assert await store.wait_for_queue(standing=0.0, timeout=0.01) == 0
        hearing = asyncio.create_task(store.wait_for_queue(standing=0.02, timeout=30))
        await started(hearing)
        for _ in range(2):
            await store.enqueue_rollout({})
        assert await hearing == 2
        await store.dequeue_many_rollouts(limit=2)
        assert await store.wait_for_queue(standing=0.01, timeout=0.05) == 0
        await core.close()

    asyncio.run(main())
