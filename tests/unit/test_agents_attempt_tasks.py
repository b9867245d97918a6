"""The tasks of an attempt on a shared loop: what ends them, and that other tasks are not touched."""

from __future__ import annotations

import asyncio
import inspect
import sys
import warnings
from contextvars import Context
from typing import Any

import pytest

from agl_ray.agents.attempt_tasks import AttemptTasks


async def exits() -> None:
    sys.exit(3)


async def rests() -> str:
    await asyncio.sleep(60)
    return "rested"


def test_exits_of_child_tasks_are_errors_and_the_loop_goes_on() -> None:
    async def main() -> None:
        tasks = AttemptTasks()

        async def agent() -> list[Any]:
            caught = await asyncio.gather(exits(), return_exceptions=True)
            async with asyncio.timeout(5):
                caught += await asyncio.gather(asyncio.wait_for(exits(), 5), return_exceptions=True)
            return caught

        for error in [*await tasks.begin(agent()), await tasks.exited]:
            assert isinstance(error, RuntimeError)
            assert str(error) == "the agent called sys.exit(3)"

    asyncio.run(main())


def test_other_tasks_of_the_loop_are_made_as_before() -> None:
    made: list[str] = []

    def theirs(loop: asyncio.AbstractEventLoop, work: Any, **how: Any) -> asyncio.Task[Any]:
        made.append(work.__qualname__)
        return asyncio.Task(work, loop=loop, **how)

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(theirs)

        async def agent() -> None:
            free = asyncio.create_task(rests(), context=Context())
            assert inspect.iscoroutine(free.get_coro())
            free.cancel()

        await AttemptTasks().begin(agent())
        await AttemptTasks().begin(agent())
        other = asyncio.create_task(rests())
        assert inspect.iscoroutine(other.get_coro())
        other.cancel()

    asyncio.run(main())
    ours = [name for name in made if name.endswith("agent")]
    assert (len(ours), made.count("rests")) == (2, 3)  # each by their factory, once


def test_a_guarded_task_has_its_name_its_state_and_its_cancellation() -> None:
    async def main() -> None:
        async def agent() -> None:
            never = asyncio.create_task(rests(), name="never")
            never.cancel()  # before its first step
            begun = asyncio.create_task(rests(), name="begun")
            await asyncio.sleep(0)
            assert begun.get_name() == "begun"
            assert "rests" in repr(begun)
            assert begun.get_stack()[0].f_code is rests.__code__
            state = inspect.getcoroutinestate(begun.get_coro())  # type: ignore[arg-type]
            assert state == inspect.CORO_SUSPENDED  # anyio asks for it
            begun.cancel("enough")
            for task in (never, begun):
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert begun.cancelled()

        await AttemptTasks().begin(agent())

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asyncio.run(main())
