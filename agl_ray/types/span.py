"""A span as an object, for those who add or read a few of them; columns are the faster way to many (`agl_ray.spans`).

Who calls it: `LightningStore.add_span`, `add_many_spans` and `query_spans`. Test alone: tests/unit/test_store_span_objects.py.
"""

from __future__ import annotations

from typing import Any

from agl_ray.types.rollout import Record


class Span(Record, frozen=True):
    """One step of an attempt. Times are seconds since the epoch.

    sequence_id: its place in its rollout, from 1; None = the store's next one. span_id: unique in its attempt; None = a new one.
    kind: `call` (a model call), `reward` or `span`. status: UNSET, OK or ERROR. start_time: None = now, end_time: None = start_time.
    attributes, resource: JSON values by name; events, links: lists of JSON values.
    extra: the columns of a model call or a reward, by their names in `agl_ray.spans.SPAN_SCHEMA` (`prompt_ids`, `reward`, ...);
    only those that are set.
    """

    rollout_id: str
    attempt_id: str
    name: str
    sequence_id: int | None = None
    trace_id: str | None = None
    span_id: str | None = None
    parent_id: str | None = None
    kind: str = "span"
    status: str = "UNSET"
    status_message: str | None = None
    attributes: dict[str, Any] = {}
    events: list[Any] = []
    links: list[Any] = []
    resource: dict[str, Any] = {}
    start_time: float | None = None
    end_time: float | None = None
    extra: dict[str, Any] = {}
