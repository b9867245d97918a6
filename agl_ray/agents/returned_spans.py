"""An agent that returns spans instead of a reward, as agentlightning 0.3 allows: they become spans of its attempt.

Each is a finished span of OpenTelemetry's SDK, an `agl.Span`, or a dictionary of a span's fields (`name` is enough); ids that a dictionary
leaves out are the attempt's. What the attempt has recorded by itself is not recorded twice. Called by `agl_ray.agents.outcome`. Test alone:
tests/unit/test_agents_returned_spans.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from agl_ray.spans import KIND_SPAN, span_batch
from agl_ray.spans.objects import span_row
from agl_ray.spans.otel import columns_of
from agl_ray.tracing import SpanRecorder
from agl_ray.types import InputError, Span


def record_returned(spans: Sequence[Any], recorder: SpanRecorder) -> float | None:
    """Record the spans; the last reward among them that is for the whole rollout. InputError, and nothing recorded, where one is no span."""
    rows = [_row(span, number, recorder) for number, span in enumerate(spans)]
    for row in rows:
        if not recorder.has(row["span_id"]):
            recorder.add_row(row)
    rewards = [
        row for row in rows if row.get("reward") is not None and not row.get("reward_target")
    ]
    return float(rewards[-1]["reward"]) if rewards else None


def _row(span: Any, number: int, recorder: SpanRecorder) -> dict[str, Any]:
    try:
        row = _given(span, recorder)
        span_batch([row])  # says what cannot be stored while the agent can still be told
    except (InputError, TypeError, ValueError) as error:  # pyarrow's and msgspec's are among them
        raise InputError(
            f"the agent returned spans, and number {number} is none: {error}"
        ) from error
    for name in ("rollout_id", "attempt_id"):
        if row[name] != getattr(recorder, name):
            raise InputError(
                f"the agent returned spans, and number {number} has the {name} {row[name]!r}: expected its own, {getattr(recorder, name)!r}"
            )
    row["sequence_id"] = None  # the store's to give
    row["trace_id"] = row["trace_id"] or f"{recorder.root.trace_id:032x}"
    if row["parent_id"] == f"{recorder.root.span_id:016x}":
        row["parent_id"] = None  # the attempt itself, which is no span
    return row


def _given(span: Any, recorder: SpanRecorder) -> dict[str, Any]:
    from opentelemetry.sdk.trace import ReadableSpan  # no light import

    from agl_ray.spans.otel import row_of_readable

    if isinstance(span, ReadableSpan):
        return row_of_readable(span, recorder.rollout_id, recorder.attempt_id)
    if isinstance(span, Mapping):
        ids = {"rollout_id": recorder.rollout_id, "attempt_id": recorder.attempt_id}
        span = msgspec.convert(ids | dict(span), Span)
    if not isinstance(span, Span):
        raise InputError(
            f"expected a span of OpenTelemetry's SDK, an agl.Span or a dictionary of its fields, got {type(span).__name__}"
        )
    row = span_row(span)
    if row["kind"] == KIND_SPAN:
        row |= columns_of(row["span_id"], span.attributes) | span.extra
    return row
