"""Spans made inside the agent's process, kept until the runner writes them to the store in Arrow batches.

A `SpanRecorder` belongs to one attempt; `recording(recorder)` makes it the current one. It lives in OpenTelemetry's context (a
contextvar), so many rollouts share a process, and whatever carries that context to another task or thread carries the recorder.
Each recorder is a trace of its own: its spans share a trace id, and what has no parent in the attempt has none at all.

A span that could not be kept is counted by `lose`; the runner ends such an attempt `lost`, never `ok`.
Who calls it: emitters, `operation`, the OpenTelemetry processor (sdk.py), the runner. Test alone: tests/unit/test_tracing_emit.py.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from agl_ray.spans import new_span_id

MANY = 256  # rows waiting at which the owner is asked to fetch them
MOST = 16_384  # rows waiting at which further ones are lost: an agent that makes spans without end must not fill the memory
_KEY = otel_context.create_key("agl_ray.recorder")
_traces: weakref.WeakValueDictionary[int, SpanRecorder] = weakref.WeakValueDictionary()
_traces_lock = threading.Lock()

log = logging.getLogger("agl_ray.tracing")


class SpanRecorder:
    """Rows in the columns of SPAN_SCHEMA for one attempt; safe to use from several threads.

    on_many: called, from any thread, when at least MANY rows wait; whoever sets it calls `take` soon.
    otlp_endpoint: where other processes of the agent may send spans (OTLP/HTTP); None where there is no such door.
    """

    def __init__(
        self, rollout_id: str, attempt_id: str, *, otlp_endpoint: str | None = None
    ) -> None:
        self.rollout_id, self.attempt_id = rollout_id, attempt_id
        self.otlp_endpoint = otlp_endpoint
        self.on_many: Callable[[], None] | None = None
        self.root = SpanContext(
            secrets.randbits(128) or 1, secrets.randbits(64) or 1, False, TraceFlags(1)
        )
        self.lost: Counter[str] = Counter()  # spans by the reason why they were not kept
        self.late = 0  # spans that began after the end
        self.closed = False
        self._rows: list[dict[str, Any]] = []
        self._recorded = 0
        self._ids: set[str] = set()
        self._last_reward: float | None = None
        self._unfinished: dict[int, Callable[[], dict[str, Any]]] = {}
        self._lock = threading.Lock()
        self._process = os.getpid()
        self.join(self.root.trace_id)

    def join(self, trace_id: int) -> None:
        """The spans of this trace are the attempt's."""
        if _traces.get(trace_id) is not self:
            with _traces_lock:
                _traces[trace_id] = self

    @property
    def waiting(self) -> int:
        """Rows that wait to be taken."""
        return len(self._rows)

    @property
    def num_spans(self) -> int:
        """Spans of the attempt so far, those that were lost included."""
        return self._recorded + self.lost.total()

    def has(self, span_id: str) -> bool:
        """Whether a span of this id was recorded."""
        return span_id in self._ids

    def is_own_process(self) -> bool:
        """False in a forked copy of the agent's process: nobody fetches what is recorded there."""
        return os.getpid() == self._process

    def parent(self) -> tuple[SpanContext, str | None]:
        """The span that a new one is a child of here, and its id; the id is None where that is the attempt itself."""
        here = trace.get_current_span().get_span_context()
        if not here.is_valid or here.span_id == self.root.span_id:
            return self.root, None
        return here, f"{here.span_id:016x}"

    def add(self, *, name: str, kind: str, **columns: Any) -> str:
        """Record one finished span and return its id; `columns` are further columns of SPAN_SCHEMA. RuntimeError after the end."""
        now = time.time_ns()
        above, parent_id = self.parent()
        row = {
            "rollout_id": self.rollout_id,
            "attempt_id": self.attempt_id,
            "trace_id": f"{above.trace_id:032x}",
            "span_id": new_span_id(),
            "parent_id": parent_id,
            "name": name,
            "kind": kind,
            "start_ns": now,
            "end_ns": now,
            "status": "OK",
            **columns,
        }
        self.add_row(row)
        return str(row["span_id"])

    def rows(self) -> list[dict[str, Any]]:
        """The rows that wait to be taken."""
        with self._lock:
            return list(self._rows)

    def add_row(self, row: dict[str, Any]) -> None:
        """Record a whole row. RuntimeError where the attempt has ended or this is a forked copy of its process."""
        if not self.is_own_process():
            raise RuntimeError(
                f"{row['name']}: this is a forked copy of the agent's process, from where nothing reaches attempt {self.attempt_id}; "
                "emit in the process of the agent, or start a program and send spans over OTLP"
            )
        with self._lock:
            if self.closed:
                self._come_late(row["name"])
                raise RuntimeError(
                    f"{row['name']}: attempt {self.attempt_id} has ended; what its threads and tasks say now is not part of it"
                )
            self._keep(row)
        self._wake()

    def _wake(self) -> None:
        if self.on_many is not None and len(self._rows) >= MANY:
            self.on_many()

    def _keep(self, row: dict[str, Any]) -> None:
        if len(self._rows) >= MOST:
            self.lost[f"more than {MOST} waited to be stored"] += 1
            return
        self._rows.append(row)
        self._recorded += 1
        self._ids.add(row["span_id"])
        # A reward with a target is for a call or a tag, not for the rollout.
        if row.get("reward") is not None and row.get("reward_target") is None:
            self._last_reward = row["reward"]

    def why_lost(self) -> str | None:
        """A sentence for people where spans were lost, else None."""
        if not self.lost:
            return None
        reasons = "; ".join(f"{reason} ({number})" for reason, number in self.lost.most_common(3))
        return f"{self.lost.total()} of the attempt's {self.num_spans} spans were lost: {reasons}"

    def lose(self, reason: str, number: int = 1) -> None:
        """Count spans that cannot be kept."""
        with self._lock:
            self.lost[reason] += number

    def began(self, span_id: int, unfinished: Callable[[], dict[str, Any]]) -> bool:
        """A span has begun; `unfinished` makes its row where it does not finish before the attempt ends. False where nobody will
        fetch it: after the end, or in a forked copy of the agent's process."""
        with self._lock:
            if self.closed or not self.is_own_process():
                self._come_late(f"{span_id:016x}")
                return False
            self._unfinished[span_id] = unfinished
            return True

    def finish(self, span_id: int, row: dict[str, Any] | None, lost: str = "") -> None:
        """The span is over: its row, or None and why it is lost. Nothing where it has been recorded as unfinished."""
        with self._lock:
            if self._unfinished.pop(span_id, None) is None:
                return
            if row is None:
                self.lost[lost] += 1
            else:
                self._keep(row)
        self._wake()

    def _come_late(self, what: str) -> None:
        self.late += 1
        if self.late == 1:
            log.warning(
                "attempt %s: span %s is not recorded: it began after the end of the attempt, or in a forked copy of its process; "
                "so may further ones",
                self.attempt_id,
                what,
            )

    def take(self) -> list[dict[str, Any]]:
        """All rows recorded since the last call."""
        with self._lock:
            rows, self._rows = self._rows, []
        return rows

    def close(self) -> list[dict[str, Any]]:
        """End the recording: the rows since the last `take`, and one for each span that has not finished, as it is now."""
        with self._lock:
            self.closed = True
            unfinished, self._unfinished = list(self._unfinished.values()), {}
        for make in unfinished:
            try:
                row = make()
            except Exception as error:  # noqa: BLE001  a foreign span may hold anything
                self.lose(f"{type(error).__name__}: {error}")
                continue
            with self._lock:
                self._keep(row)
        return self.take()

    def last_reward(self) -> float | None:
        """The newest reward for the rollout itself."""
        return self._last_reward


@contextmanager
def recording(recorder: SpanRecorder) -> Iterator[SpanRecorder]:
    """Make `recorder` the current one inside the block."""
    inside = trace.set_span_in_context(
        NonRecordingSpan(recorder.root), otel_context.set_value(_KEY, recorder)
    )
    token = otel_context.attach(inside)
    try:
        yield recorder
    finally:
        otel_context.detach(token)


def recorder_here(given: Context | None = None) -> SpanRecorder | None:
    """The recorder in `given`, or in the context of here; None outside of a rollout."""
    found = otel_context.get_value(_KEY, given)
    return found if isinstance(found, SpanRecorder) else None


def recorder_of_trace(trace_id: int) -> SpanRecorder | None:
    """The recorder that a trace belongs to, closed ones included while somebody holds them."""
    return _traces.get(trace_id)


def current_recorder() -> SpanRecorder:
    """The recorder of the attempt that runs here; RuntimeError outside of one."""
    recorder = recorder_here()
    if recorder is None:
        raise RuntimeError(
            "no rollout is running here: emitters work inside an agent started by a runner "
            "(or inside `agl_ray.tracing.recording(...)` in a test)"
        )
    return recorder
