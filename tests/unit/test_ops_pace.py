"""A pace is kept, in order, and a wait that is given up costs nobody a turn."""

from __future__ import annotations

import asyncio
import time

from agl_ray.ops.pace import Pace


def test_turns_are_spread_and_in_order() -> None:
    async def run() -> tuple[list[int], float]:
        pace, order = Pace(3000), []  # one in 20 ms

        async def take(number: int) -> None:
            await pace.turn()
            order.append(number)

        started = time.monotonic()
        await asyncio.gather(*(take(number) for number in range(6)))
        return order, time.monotonic() - started

    order, seconds = asyncio.run(run())
    assert order == list(range(6))
    assert seconds >= 0.1


def test_a_cancelled_wait_costs_no_turn() -> None:
    async def run() -> float:
        pace = Pace(600)  # one in 100 ms
        await pace.turn()
        started = time.monotonic()
        given_up = [asyncio.create_task(pace.turn()) for _ in range(20)]
        await asyncio.sleep(0)
        for task in given_up:
            task.cancel()
        await pace.turn()
        return time.monotonic() - started

    assert 0.05 < asyncio.run(run()) < 1.0
