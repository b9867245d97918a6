"""Calling code that is not ours: a coroutine or a plain function that may raise, exit, fork or never come back.

Called by `agl_ray.agents.execute`. Test alone: tests/unit/test_agents_execute.py.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

LEAVE = 1.0  # seconds that an agent gets to end once it has been cancelled

_left: set[threading.Thread] = set()
in_threads: ContextVar[list[asyncio.Future[Any]] | None] = ContextVar("in_threads", default=None)
"""Where set, `in_thread` adds what it awaits: whoever cancels can see what goes on all the same."""


def left_threads() -> int:
    """Threads of plain functions that nobody waits for any more (their deadline passed) and that still run: they cannot be ended."""
    _left.intersection_update([thread for thread in _left if thread.is_alive()])
    return len(_left)


async def call(function: Callable[..., Any], kwargs: dict[str, Any], *, apart: bool) -> Any:
    """What `function(**kwargs)` returns, awaited where it is a coroutine.

    apart: run a plain function in a thread of its own, so that this loop goes on; cancelled, the thread is left behind. Wherever it runs,
    it may call `asyncio.run`. SystemExit, with which asyncio would end the whole process, becomes RuntimeError.
    """
    with contained():
        if inspect.iscoroutinefunction(function):
            return await function(**kwargs)
        if apart:
            value = await in_thread(lambda: function(**kwargs))
        else:
            with _off_the_loop():
                value = function(**kwargs)
        return await value if inspect.isawaitable(value) else value


@contextmanager
def _off_the_loop() -> Iterator[None]:
    """Around a plain function that is called on this loop and holds it up: it finds no loop, as in a thread of its own, and may run one (the
    synchronous face of many agent libraries does). Not in another thread: breakpoints work in this one."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    # The three are asyncio's door for those who write event loops.
    if task is not None:
        asyncio._leave_task(loop, task)
    asyncio._set_running_loop(None)
    asyncio.set_event_loop(None)
    try:
        yield
    finally:
        asyncio.set_event_loop(None)  # as asyncio.run leaves it: coroutines find the running loop
        asyncio._set_running_loop(loop)
        if task is not None:
            asyncio._enter_task(loop, task)


@contextmanager
def contained(told: Callable[[RuntimeError], None] = lambda error: None) -> Iterator[None]:
    """Around code of the agent's: nothing that ends a process comes out, but for a person's Ctrl-C; nor does a copy made by os.fork: there
    must not be two of us. told: hears of the error that comes out instead."""
    pid = os.getpid()
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as error:
        if isinstance(error, SystemExit):
            said = f"called sys.exit({error.code})"
        elif threading.current_thread() is threading.main_thread():
            raise
        else:
            said = "raised KeyboardInterrupt"
        instead = RuntimeError(f"the agent {said}").with_traceback(error.__traceback__)
        told(instead)
        raise instead from error
    finally:
        if os.getpid() != pid:
            os._exit(0)


async def in_thread(work: Callable[[], Any], stop: Callable[[], None] | None = None) -> Any:
    """What `work()` returns, from a thread of its own: never one of a pool, which a few that hang would fill. `contained`: SystemExit would
    end the loop on which it is awaited.

    stop: called when this is cancelled; the thread then gets LEAVE seconds to end. Else, and after them, it is left behind.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()
    context = contextvars.copy_context()

    def tell(value: Any, error: BaseException | None) -> None:
        if not ended.done():
            ended.set_result((value, error))

    def run() -> None:
        value, error = None, None
        try:
            with contained():
                value = context.run(work)
        except BaseException as caught:  # noqa: BLE001  raised again where it is awaited
            error = caught
        if not loop.is_closed():  # left behind, and its runner has gone
            loop.call_soon_threadsafe(tell, value, error)

    thread = threading.Thread(target=run, name="agent", daemon=True)
    thread.start()
    known = in_threads.get()
    if known is not None:
        known.append(ended)
    try:
        await asyncio.wait({ended})  # which leaves `ended` as it is when this is cancelled
    except asyncio.CancelledError:
        if stop is not None:
            stop()
            await asyncio.wait({ended}, timeout=LEAVE)
        _left.add(thread)
        raise
    value, error = ended.result()
    if error is not None:
        raise error
    return value
