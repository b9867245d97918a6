"""Spans of OpenTelemetry's SDK, made by any library in the agent's process, as spans of the attempt they belong to.

What it is: `install()` adds our processor to the process's global TracerProvider. One that the agent's modules have set stays, with its
own exporters; where there is none, an SDK provider is set. A span belongs to the attempt whose trace its parent is in, else to the one in
the context it was started with, else to the one of the context around; so it finds its place even where a library keeps parents by hand
or starts new traces. Spans made outside of a rollout are left alone. One that is open when its attempt ends is recorded as it is then
(`agl.unfinished`); one that cannot be recorded is counted as lost, which ends the attempt `lost`.

What is not seen: spans of a TracerProvider that is not the global one, and what a provider's own sampler drops.
Who calls it: the runner, before it leases its first rollout. Test alone: tests/unit/test_tracing_sdk.py.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
import weakref
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider

from agl_ray.spans.otel import row_of_readable
from agl_ray.tracing.names import UNFINISHED
from agl_ray.tracing.recorder import SpanRecorder, recorder_here, recorder_of_trace

log = logging.getLogger("agl_ray.tracing")


class RecorderProcessor(SpanProcessor):
    """Hands every span to the recorder of its attempt. One of it serves all attempts of a process."""

    def __init__(self) -> None:
        self._owners: weakref.WeakValueDictionary[int, SpanRecorder] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        recorder = _owner(span, parent_context)
        if recorder is None or span.context is None:
            return
        recorder.join(span.context.trace_id)
        if recorder.began(span.context.span_id, functools.partial(_unfinished, span, recorder)):
            with self._lock:
                self._owners[span.context.span_id] = recorder

    def on_end(self, span: ReadableSpan) -> None:
        if span.context is None:
            return
        with self._lock:
            recorder = self._owners.pop(span.context.span_id, None)
        if recorder is None:
            return
        try:
            row, lost = _row(span, recorder), ""
        except Exception as error:  # noqa: BLE001  a span may hold anything, and the agent that ends it is not to blame
            row, lost = None, f"{span.name}: {type(error).__name__}: {error}"
            log.warning("attempt %s: span %s is lost", recorder.attempt_id, lost)
        recorder.finish(span.context.span_id, row, lost)

    def shutdown(self) -> None:
        """Nothing to close: an agent that shuts its provider down may still be followed by other rollouts."""

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """True: a span is with its recorder as soon as it ends; the runner sends it on."""
        return True


def _owner(span: Span, parent_context: Context | None) -> SpanRecorder | None:
    given = span.context and recorder_of_trace(span.context.trace_id)
    if given is not None and not given.closed:
        return given
    around = recorder_here(parent_context) or recorder_here()
    return given if around is None else around


def _row(span: ReadableSpan, recorder: SpanRecorder) -> dict[str, Any]:
    row = row_of_readable(span, recorder.rollout_id, recorder.attempt_id)
    if span.parent is not None and span.parent.span_id == recorder.root.span_id:
        row["parent_id"] = None  # the attempt itself, which is no span
    return row


def _unfinished(span: Span, recorder: SpanRecorder) -> dict[str, Any]:
    """The row of a span that is still open, as if it ended now."""
    now = ReadableSpan(
        name=span.name,
        context=span.context,
        parent=span.parent,
        resource=span.resource,
        attributes={**(span.attributes or {}), UNFINISHED: True},
        events=span.events,
        links=span.links,
        kind=span.kind,
        status=span.status,
        start_time=span.start_time,
        end_time=time.time_ns(),
        instrumentation_scope=span.instrumentation_scope,
    )
    return _row(now, recorder)


_processor = RecorderProcessor()
_watched: weakref.WeakSet[Any] = weakref.WeakSet()


def install() -> None:
    """Watch the global TracerProvider of this process; again where it is watched already: nothing."""
    provider: Any = trace.get_tracer_provider()
    if isinstance(provider, trace.ProxyTracerProvider):  # nobody has set one
        trace.set_tracer_provider(TracerProvider())
        provider = trace.get_tracer_provider()
    if provider in _watched:
        return
    if not hasattr(provider, "add_span_processor"):
        log.warning(
            "tracing: the TracerProvider that is set (%s) takes no span processors: its spans do not become part of rollouts; "
            "set one of opentelemetry.sdk.trace, or none",
            type(provider).__name__,
        )
        return
    provider.add_span_processor(_processor)
    _watched.add(provider)
