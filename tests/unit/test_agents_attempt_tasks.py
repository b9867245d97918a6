"""The tasks of an attempt on a shared loop: what ends them, and that other tasks are not touched."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import sys
import warnings
from contextvars import Context
from pathlib import Path
from typing import Any

import pytest

from agl_ray.agents import attempt_tasks
from agl_ray.agents.attempt_tasks import AttemptTasks, left_tasks


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


TICKS: list[str] = []


async def ticks(name: str) -> None:
    while True:
        TICKS.append(name)
        await asyncio.sleep(0.01)


async def cleans_up() -> None:
    """Has a task of its own make clean when it is cancelled, as `asyncio.wait_for` does."""
    try:
        await asyncio.sleep(60)
    finally:
        await asyncio.wait_for(asyncio.sleep(0.02), 5)
        TICKS.append("clean")


async def ignores(until: asyncio.Event) -> None:
    while not until.is_set():
        with contextlib.suppress(asyncio.CancelledError):
            await until.wait()


def package(folder: Path) -> Any:
    """`ticks` as the code of an installed package."""
    file = folder / "site-packages" / "driver.py"
    source = "async def ticks(ticking):\n    await ticking\n"
    found: dict[str, Any] = {}
    exec(compile(source, str(file), "exec"), found)
    return found["ticks"]


def test_the_deadline_stops_every_task_of_the_attempt_and_no_other(tmp_path: Path) -> None:
    async def main() -> None:
        tasks = AttemptTasks()
        other = AttemptTasks()
        mine: list[asyncio.Task[None]] = []

        async def agent() -> None:
            mine.append(asyncio.create_task(ticks("own")))
            mine.append(asyncio.create_task(package(tmp_path)(ticks("package"))))
            mine.append(asyncio.create_task(cleans_up()))
            mine.append(asyncio.create_task(ticks("free"), context=Context()))
            await asyncio.sleep(60)

        mine.append(tasks.begin(agent()))
        theirs = other.begin(ticks("other"))
        await asyncio.sleep(0.05)
        assert not await tasks.stop()
        assert [task.done() for task in mine] == [True, True, True, True, False]
        assert not theirs.done()
        assert "clean" in TICKS
        for task in (mine[4], theirs):
            task.cancel()
        assert left_tasks() == 0

    asyncio.run(main())


def test_after_an_end_of_its_own_the_tasks_of_packages_stay_and_are_counted(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        tasks = AttemptTasks()
        mine: list[asyncio.Task[None]] = []

        async def agent() -> None:
            mine.append(asyncio.create_task(ticks("own")))
            mine.append(asyncio.create_task(package(tmp_path)(ticks("package"))))
            await asyncio.sleep(0)

        await tasks.begin(agent())
        assert not await tasks.stop_own()
        assert [task.done() for task in mine] == [True, False]
        assert left_tasks() == 1
        mine[1].cancel()
        await asyncio.wait(mine)
        assert left_tasks() == 0

    asyncio.run(main())


def test_a_task_that_ignores_its_end_is_said_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt_tasks, "LEAVE", 0.0)
    monkeypatch.setattr(attempt_tasks, "GRACE", 0.05)

    async def main() -> None:
        end = asyncio.Event()
        tasks = AttemptTasks()
        task = tasks.begin(ignores(end))
        await asyncio.sleep(0)
        assert await tasks.stop()
        assert left_tasks() == 1
        end.set()
        await task
        assert left_tasks() == 0

    asyncio.run(main())
