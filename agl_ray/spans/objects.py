"""Spans as objects, to and from the rows of SPAN_SCHEMA.

What it is: `span_row` gives what `span_batch` takes, `span_object` takes what `LightningStore.query_span_rows` gives.
Who calls it: `agl_ray.store.span_calls`, the OTLP door. Test alone: tests/unit/test_spans_objects.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from agl_ray.spans.build import new_span_id
from agl_ray.spans.schema import KIND_CALL, KIND_REWARD, KIND_SPAN, SPAN_SCHEMA
from agl_ray.types import InputError, Span

KINDS = (KIND_SPAN, KIND_CALL, KIND_REWARD)
STATUSES = ("UNSET", "OK", "ERROR")
SAME = (
    *("rollout_id", "attempt_id", "sequence_id", "trace_id", "span_id", "parent_id", "name"),
    *("kind", "status", "status_message"),
)
"""Fields of a span that are columns of the same name and value."""
JSON = ("attributes", "events", "links", "resource")
EXTRA = tuple(
    name for name in SPAN_SCHEMA.names if name not in {*SAME, *JSON, "start_ns", "end_ns"}
)
"""Columns that a span carries in `extra`."""


def span_row(span: Span) -> dict[str, Any]:
    """The span as a row: a new span id where it has none, now where it has no start. InputError names what does not fit."""
    if span.kind not in KINDS:
        raise InputError(f"span.kind: expected one of {[*KINDS]}, got {span.kind!r}")
    if span.status not in STATUSES:
        raise InputError(f"span.status: expected one of {[*STATUSES]}, got {span.status!r}")
    unknown = span.extra.keys() - set(EXTRA)
    if unknown:
        raise InputError(
            f"span.extra: expected some of {[*EXTRA]}, got {sorted(unknown)[0]!r}; anything else goes into attributes"
        )
    start = time.time() if span.start_time is None else span.start_time
    end = start if span.end_time is None else span.end_time
    row: dict[str, Any] = {name: getattr(span, name) for name in SAME}
    row |= {name: getattr(span, name) or None for name in JSON}
    row |= {"span_id": span.span_id or new_span_id()}
    row |= {"start_ns": _nanoseconds(start), "end_ns": _nanoseconds(end)}
    return row | span.extra


def span_object(row: Mapping[str, Any]) -> Span:
    """The span in `row`, whose JSON columns are decoded; columns that are empty may be missing."""
    given = {name: row[name] for name in JSON if row.get(name) is not None}
    return Span(
        **{name: row[name] for name in SAME},
        **given,
        start_time=_seconds(row["start_ns"]),
        end_time=_seconds(row["end_ns"]),
        extra={name: row[name] for name in EXTRA if row.get(name) is not None},
    )


def _nanoseconds(seconds: float) -> int:
    """Whole seconds apart, so that what a float can hold is not rounded once more."""
    whole = math.floor(seconds)
    return whole * 10**9 + round((seconds - whole) * 1e9)


def _seconds(nanoseconds: int) -> float:
    whole, rest = divmod(nanoseconds, 10**9)
    return whole + rest / 1e9
