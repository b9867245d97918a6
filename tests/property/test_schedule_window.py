"""The staleness bound holds for every sample, and every slot is trained exactly once, whatever the timing."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agl_ray.schedule import RowOrder, SlotState, WindowedQueue


async def simulate(
    groups: int, staleness: int, batches: int, workers: int, seed: int, first: int
) -> list[tuple[int, int, int]]:
    """(slot, version at its last start, batch it was trained in) for a run with random delays and failures."""
    chance = random.Random(seed)
    queue: WindowedQueue[tuple[int, int]] = WindowedQueue(
        groups_per_batch=groups, staleness=staleness, num_batches=batches, first_batch=first
    )
    trained: list[tuple[int, int, int]] = []

    async def pause() -> None:
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)

    async def worker() -> None:
        while (slot := await queue.start_slot()) is not None:
            started = queue.version
            await pause()
            while chance.random() < 0.3:  # a failed group starts again in the same slot
                started = queue.version
                await pause()
            await queue.finish(slot, (slot, started))

    async def learner() -> None:
        for batch in range(first, batches):
            for slot, started in await queue.next_batch():
                trained.append((slot, started, batch))
            await pause()
            await queue.advance(batch + 1)

    await asyncio.wait_for(asyncio.gather(learner(), *(worker() for _ in range(workers))), 120)
    return trained


@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 5),
    staleness=st.integers(0, 3),
    extra=st.integers(0, 5),
    workers=st.integers(1, 12),
    seed=st.integers(0, 10_000),
    first=st.integers(0, 3),
)
def test_age_is_bounded_and_every_slot_is_trained_once(
    groups: int, staleness: int, extra: int, workers: int, seed: int, first: int
) -> None:
    batches = first + extra
    trained = asyncio.run(simulate(groups, staleness, batches, workers, seed, first))
    assert [slot for slot, _, _ in trained] == list(range(first * groups, batches * groups))
    for slot, started, batch in trained:
        assert batch == slot // groups
        assert 0 <= batch - started <= staleness


def test_the_bound_is_reached_so_it_is_not_merely_synchronous() -> None:
    trained = asyncio.run(simulate(2, 2, 8, 12, 1, 0))
    assert max(batch - started for _, started, batch in trained) == 2


def test_a_slot_beyond_the_window_waits_for_the_weights() -> None:
    async def scenario() -> None:
        queue: WindowedQueue[str] = WindowedQueue(groups_per_batch=1, staleness=0, num_batches=2)
        assert await queue.start_slot() == 0
        waiting = asyncio.ensure_future(queue.start_slot())
        await queue.finish(0, "a")
        await asyncio.sleep(0)
        assert not waiting.done()  # batch 0 is finished but version 1 is not in the engines
        assert await queue.next_batch() == ["a"]
        await queue.advance(1)
        assert await waiting == 1
        assert queue.state(1) is SlotState.INFLIGHT
        assert await queue.start_slot() is None

    asyncio.run(scenario())


def test_finishing_a_slot_twice_and_going_backwards_are_refused() -> None:
    async def scenario() -> None:
        queue: WindowedQueue[str] = WindowedQueue(groups_per_batch=1, staleness=0, num_batches=2)
        await queue.start_slot()
        await queue.finish(0, "a")
        with pytest.raises(ValueError, match="slot 0"):
            await queue.finish(0, "b")
        await queue.advance(1)
        with pytest.raises(ValueError, match="version 0"):
            await queue.advance(0)

    asyncio.run(scenario())


@given(rows=st.integers(1, 50), seed=st.integers(0, 99))
def test_every_epoch_visits_every_row_once_and_is_reproducible(rows: int, seed: int) -> None:
    order = RowOrder(rows, seed)
    positions = range(2 * rows)
    visited = [order.row(i) for i in positions]
    assert sorted(visited[:rows]) == sorted(visited[rows:]) == list(range(rows))
    again = RowOrder(rows, seed)
    assert [again.row(i) for i in reversed(positions)] == visited[::-1]
