"""Waits with a name and a deadline."""

from __future__ import annotations

import asyncio

import pytest

from agl_ray import waits
from agl_ray.types import WaitTimeout


def test_a_deadline_that_passes_names_what_was_waited_for() -> None:
    async def main() -> None:
        with pytest.raises(WaitTimeout, match=r"waited 0.01 s for the moon and gave up: try later"):
            await waits.wait(asyncio.sleep(5), on="the moon", seconds=0.01, hint="try later")

    asyncio.run(main())


def test_the_result_comes_through_and_open_waits_are_listed() -> None:
    async def main() -> None:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        waiter = asyncio.ensure_future(waits.wait(future, on="an answer", seconds=30))
        await asyncio.sleep(0)
        assert [row["on"] for row in waits.current()] == ["an answer"]
        future.set_result(7)
        assert await waiter == 7
        assert waits.current() == []

    asyncio.run(main())


def test_a_cancellation_that_comes_with_the_result_is_not_lost() -> None:
    """As when a caller leaves in the moment in which its answer arrives, for every order of the two."""

    async def main(early: bool) -> None:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        waiter = asyncio.ensure_future(waits.wait(future, on="an answer", seconds=30))
        await asyncio.sleep(0)
        if early:
            waiter.cancel()
        if not future.done():
            future.set_result(7)
        if not early:
            waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter

    asyncio.run(main(early=True))
    asyncio.run(main(early=False))


def test_a_deadline_inside_keeps_its_own_name() -> None:
    async def main() -> None:
        inner = waits.wait(asyncio.sleep(5), on="the inner one", seconds=0.01)
        with pytest.raises(WaitTimeout, match="for the inner one"):
            await waits.wait(inner, on="the outer one", seconds=30)

    asyncio.run(main())


def test_what_a_wait_raises_when_it_is_cut_off_is_its_timeouts_cause() -> None:
    """As pymongo does under Python 3.11: a cancelled wait for a lock ends with RuntimeError."""

    async def stubborn() -> None:
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            raise RuntimeError("cannot wait on un-acquired lock") from None

    async def main() -> None:
        with pytest.raises(WaitTimeout, match="for the driver") as caught:
            await waits.wait(stubborn(), on="the driver", seconds=0.01)
        assert isinstance(caught.value.__cause__, RuntimeError)
        current = asyncio.current_task()
        assert current is not None
        assert not current.cancelling()

    asyncio.run(main())
