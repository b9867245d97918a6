"""Waiting on another process: every such wait has a name and a deadline (contract 2).

`wait(awaitable, on="the store's answer to dequeue", seconds=30)` is the only way the house waits across processes. On expiry it
raises `WaitTimeout`, which names the culprit. `current()` lists what this process is waiting for now, oldest first:
for error reports and debugging.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from agl_ray.types.errors import AglError, WaitTimeout

T = TypeVar("T")

_open: dict[int, tuple[str, float, float]] = {}
_ids = itertools.count()
_lock = threading.Lock()


@contextmanager
def _registered(on: str, seconds: float) -> Iterator[None]:
    key = next(_ids)
    with _lock:
        _open[key] = (on, time.monotonic(), seconds)
    try:
        yield
    finally:
        with _lock:
            _open.pop(key, None)


def current() -> list[dict[str, Any]]:
    """The open waits of this process, oldest first: `on`, `waited` and `deadline` in seconds."""
    now = time.monotonic()
    with _lock:
        rows = sorted(_open.values(), key=lambda row: row[1])
    return [{"on": on, "waited": now - since, "deadline": seconds} for on, since, seconds in rows]


async def wait(awaitable: Awaitable[T], *, on: str, seconds: float, hint: str = "") -> T:
    """Await `awaitable` (a coroutine, a future, a Ray ObjectRef) for at most `seconds`; WaitTimeout names `on`.

    What an awaitable raises because the deadline cut it off is the cause of a WaitTimeout, no error of its own.
    """
    limit = asyncio.timeout(seconds)
    with _registered(on, seconds):
        try:
            # Not wait_for: Python 3.11's loses a cancellation that arrives together with the result, and makes a task for each wait.
            async with limit:
                return await awaitable
        except Exception as error:
            late = limit.expired() or isinstance(error, TimeoutError)
            if late and not isinstance(error, WaitTimeout):
                raise WaitTimeout(on, seconds, hint) from error
            raise


def get(ref: Any, *, on: str, seconds: float, hint: str = "") -> Any:
    """`ray.get` (of one ref or a list) with a name and a deadline, for code that is not async.

    Our own errors arrive as they were raised, without Ray's remote traceback around their sentence.
    """
    import ray

    with _registered(on, seconds):
        try:
            return ray.get(ref, timeout=seconds)
        except ray.exceptions.GetTimeoutError as error:
            raise WaitTimeout(on, seconds, hint) from error
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, AglError):
                raise error.cause from error
            raise
