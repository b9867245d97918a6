"""The asyncio tasks of one attempt, on a loop that others share: `sys.exit` in one of them ends the attempt and nothing else.

    tasks = AttemptTasks()
    task = tasks.begin(work)      # `work`, and whatever it begins on this loop, belong to `tasks`
    tasks.exited                  # done once one of them called sys.exit

A task belongs to the attempt in whose context it was begun; other tasks of the loop (the runner's, Ray's) are not touched. Called by
`agl_ray.agents.execute`. Test alone: tests/unit/test_agents_attempt_tasks.py.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine, Generator
from contextvars import ContextVar
from typing import Any, TypeVar, cast

from agl_ray.agents.calling import contained

T = TypeVar("T")
_Work = Generator[Any, None, Any] | Coroutine[Any, Any, Any]
_mine: ContextVar[AttemptTasks | None] = ContextVar("attempt_tasks", default=None)


class AttemptTasks:
    """See the module's text. exited: the error that says so, for the first task that would have ended the process."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
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

    def guarded(self, work: _Work) -> Coroutine[Any, Any, Any]:
        """`work`, out of which nothing comes that would end the loop."""
        return _Guarded(work, self._exit)


class _Factory:
    """A loop's task factory: tasks of attempts are guarded, then made as they would have been made without it."""

    def __init__(self, inner: Callable[..., Any] | None) -> None:
        self._inner: Callable[..., Any] = inner or _plain_task

    def __call__(
        self,
        loop: asyncio.AbstractEventLoop,
        work: Generator[Any, None, T] | Coroutine[Any, Any, T],
        /,
        **how: Any,
    ) -> asyncio.Future[T]:
        context = how.get("context")
        mine = _mine.get() if context is None else context.get(_mine)
        made: asyncio.Future[T] = self._inner(
            loop, work if mine is None else mine.guarded(work), **how
        )
        return made


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
