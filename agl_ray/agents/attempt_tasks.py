"""The asyncio tasks of one attempt, on a loop that others share: they end with it, and `sys.exit` in one of them ends nothing else.

    tasks = AttemptTasks()
    task = tasks.begin(work)      # `work`, and whatever it begins on this loop, belong to `tasks`
    tasks.exited                  # done once one of them called sys.exit
    await tasks.stop()            # at the deadline; `stop_own` where `work` has ended by itself

A task belongs to the attempt in whose context it was begun; other tasks of the loop (the runner's, Ray's) are not touched. What is to live
longer is begun outside of it: `asyncio.create_task(work, context=contextvars.Context())`. Called by
`agl_ray.agents.execute`. Test alone: tests/unit/test_agents_attempt_tasks.py.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import weakref
from collections.abc import Callable, Coroutine, Generator
from contextvars import ContextVar
from pathlib import PurePath
from typing import Any, TypeVar, cast

from agl_ray.agents.calling import LEAVE, contained

GRACE = 0.5  # seconds beyond what a thread gets
PACKAGES = {"site-packages", "dist-packages"}

T = TypeVar("T")
_Work = Generator[Any, None, Any] | Coroutine[Any, Any, Any]
_mine: ContextVar[AttemptTasks | None] = ContextVar("attempt_tasks", default=None)
_left: weakref.WeakSet[asyncio.Future[Any]] = weakref.WeakSet()


def left_tasks() -> int:
    """Tasks of attempts that have ended which still run: those that ignore their cancellation, and those that were left alone (`stop_own`)."""
    return sum(not task.done() for task in _left)


class AttemptTasks:
    """See the module's text. exited: the error that says so, for the first task that would have ended the process."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._tasks: weakref.WeakSet[asyncio.Future[Any]] = weakref.WeakSet()
        self.exited: asyncio.Future[RuntimeError] = self._loop.create_future()

    def begin(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """`work` as a task of the attempt."""
        factory = self._loop.get_task_factory()
        if not isinstance(factory, _Factory):
            self._loop.set_task_factory(_Factory(factory))
        context = contextvars.copy_context()
        context.run(_mine.set, self)
        return context.run(self._loop.create_task, work)

    def _exit(self, error: RuntimeError) -> None:
        if not self.exited.done():
            self.exited.set_result(error)

    async def stop(self) -> bool:
        """Cancel all that is not done, whoever began it: the deadline stops the agent. Whether some of it goes on all the same."""
        return await self._stop(lambda task: True)

    async def stop_own(self) -> bool:
        """Cancel what the agent's own code has left running after its end. What an installed package runs is left alone: it may serve a
        client that the rollouts of this process share (the monitors of a database's driver, a browser's connection) and that would be dead
        for all later ones; what of it is an agent's is refused by the gateway at its next call. Counted in `left_tasks`."""
        return await self._stop(lambda task: not _of_package(task))

    async def _stop(self, wanted: Callable[[asyncio.Future[Any]], bool]) -> bool:
        going: set[asyncio.Future[Any]] = set()
        for seconds in (LEAVE + GRACE, GRACE):  # the second: for what they have begun in their end
            going = {task for task in self._tasks if not task.done() and wanted(task)}
            if not going:
                break
            for task in going:
                task.add_done_callback(_seen)
                task.cancel()
            await asyncio.wait(going, timeout=seconds)
        _left.update(task for task in self._tasks if not task.done())
        return any(not task.done() for task in going)

    def make(
        self, how: Callable[[Coroutine[Any, Any, Any]], asyncio.Future[T]], work: _Work
    ) -> asyncio.Future[T]:
        """A task of `work`, out of which nothing comes that would end the loop."""
        task = how(_Guarded(work, self._exit))
        self._tasks.add(task)
        return task


def _seen(task: asyncio.Future[Any]) -> None:
    """What an agent raises after its end is no longer of interest, and asyncio would complain of it."""
    if not task.cancelled():
        task.exception()


def _of_package(task: asyncio.Future[Any]) -> bool:
    """Whether a task runs code of an installed package (or compiled code) and not of the agent's."""
    work = task.get_coro() if isinstance(task, asyncio.Task) else None
    code = getattr(work, "cr_code", None) or getattr(work, "gi_code", None)
    return code is None or not PACKAGES.isdisjoint(PurePath(code.co_filename).parts)


class _Factory:
    """A loop's task factory: tasks of attempts are guarded, then made as they would have been made without it."""

    def __init__(self, inner: Callable[..., Any] | None) -> None:
        self._inner: Callable[..., asyncio.Future[Any]] = inner or _plain_task

    def __call__(
        self,
        loop: asyncio.AbstractEventLoop,
        work: Generator[Any, None, T] | Coroutine[Any, Any, T],
        /,
        **how: Any,
    ) -> asyncio.Future[T]:
        context = how.get("context")
        mine = _mine.get() if context is None else context.get(_mine)
        made = functools.partial(self._inner, loop, **how)
        return made(work) if mine is None else mine.make(made, work)


def _plain_task(
    loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any], **how: Any
) -> asyncio.Task[Any]:
    return asyncio.Task(work, loop=loop, **how)


class _Guarded(Coroutine[Any, Any, Any]):
    """A coroutine, each step of it contained. Not a coroutine function around it: cancelled before its first step, that would leave the
    inner one unawaited. Whoever asks a task for its coroutine finds the inner one's name, frame and state here."""

    def __init__(self, inner: _Work, exited: Callable[[RuntimeError], None]) -> None:
        self._inner, self._exited = inner, exited

    def send(self, value: Any) -> Any:
        with contained(self._exited):
            return self._inner.send(value)

    def throw(self, *error: Any) -> Any:
        with contained(self._exited):
            return self._inner.throw(*error)

    def close(self) -> None:
        with contained(self._exited):
            self._inner.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return cast("Coroutine[Any, Any, Any]", self._inner).__await__()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
