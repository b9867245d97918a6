"""Threads and pools that an agent uses belong to the rollout that used them.

Python gives a new thread an empty context. After `follow_threads()` a thread started inside of a rollout runs in the OpenTelemetry context
of who started it, and a function submitted to a ThreadPoolExecutor in that of who submitted it (the pool's threads themselves belong to
nobody, since they serve many rollouts). Outside of rollouts nothing is different. Tasks of asyncio, `asyncio.to_thread` and anyio's threads
carry their context by themselves. For other queues, wrap the function: `carry(function)`.

Who calls it: the runner, before it leases its first rollout. Test alone: tests/unit/test_tracing_threads.py.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from opentelemetry import context as otel_context
from opentelemetry.context import Context

from agl_ray.tracing.recorder import recorder_here

Result = TypeVar("Result")

_start = threading.Thread.start
_submit: Callable[..., Future[Any]] = ThreadPoolExecutor.submit


def carry(function: Callable[..., Result]) -> Callable[..., Result]:
    """`function`, to be called elsewhere in the OpenTelemetry context of here."""
    here = otel_context.get_current()

    @functools.wraps(function)
    def carried(*args: Any, **kwargs: Any) -> Result:
        token = otel_context.attach(here)
        try:
            return function(*args, **kwargs)
        finally:
            otel_context.detach(token)

    return carried


def follow_threads() -> None:
    """Make threads and thread pools of this process carry the context of rollouts; calling it again changes nothing."""
    setattr(threading.Thread, "start", _start_carrying)  # noqa: B010  mypy refuses to assign a method
    setattr(ThreadPoolExecutor, "submit", _submit_carrying)  # noqa: B010


@functools.wraps(_start)
def _start_carrying(thread: threading.Thread) -> None:
    if recorder_here() is not None:
        # On the object, so that classes with a `run` of their own are served too.
        setattr(thread, "run", carry(thread.run))  # noqa: B010
    _start(thread)


@functools.wraps(_submit)
def _submit_carrying(
    pool: ThreadPoolExecutor, function: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Future[Any]:
    if recorder_here() is None:
        return _submit(pool, function, *args, **kwargs)
    carried = carry(function)
    token = otel_context.attach(Context())  # a thread that the pool starts now is not the rollout's
    try:
        return _submit(pool, carried, *args, **kwargs)
    finally:
        otel_context.detach(token)
