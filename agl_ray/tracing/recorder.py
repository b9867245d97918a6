"""Spans made inside the agent's process, kept until the runner writes them to the store in one Arrow batch.

A `SpanRecorder` belongs to one attempt; `recording(recorder)` makes it the current one for this task or thread (a
contextvar: many rollouts share a process). The runner flushes it before the attempt ends, so no span is lost by ending.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from agl_ray.spans import new_span_id

_current: ContextVar[SpanRecorder | None] = ContextVar("agl_ray_recorder", default=None)


class SpanRecorder:
    """Rows in the columns of SPAN_SCHEMA for one attempt; safe to use from several threads."""

    def __init__(self, rollout_id: str, attempt_id: str) -> None:
        self.rollout_id, self.attempt_id = rollout_id, attempt_id
        self._rows: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def add(self, *, name: str, kind: str, **columns: Any) -> str:
        """Record one finished span and return its id; `columns` are further columns of SPAN_SCHEMA."""
        now = time.time_ns()
        row = {
            "rollout_id": self.rollout_id,
            "attempt_id": self.attempt_id,
            "span_id": new_span_id(),
            "name": name,
            "kind": kind,
            "start_ns": now,
            "end_ns": now,
            "status": "OK",
            **columns,
        }
        with self._lock:
            self._rows.append(row)
        return str(row["span_id"])

    def take(self) -> list[dict[str, Any]]:
        """All rows recorded since the last call."""
        with self._lock:
            rows, self._rows = self._rows, []
        return rows

    def last_reward(self) -> float | None:
        """The value of the newest reward span that has not been taken yet."""
        with self._lock:
            rewards = [row["reward"] for row in self._rows if row.get("reward") is not None]
        return rewards[-1] if rewards else None


@contextmanager
def recording(recorder: SpanRecorder) -> Iterator[SpanRecorder]:
    """Make `recorder` the current one inside the block."""
    token = _current.set(recorder)
    try:
        yield recorder
    finally:
        _current.reset(token)


def current_recorder() -> SpanRecorder:
    """The recorder of the attempt that runs here; RuntimeError outside of one."""
    recorder = _current.get()
    if recorder is None:
        raise RuntimeError(
            "no rollout is running here: emitters work inside an agent started by a runner "
            "(or inside `agl_ray.tracing.recording(...)` in a test)"
        )
    return recorder
