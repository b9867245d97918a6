"""Spans as objects and as rows."""

from __future__ import annotations

from typing import Any

import pytest

from agl_ray.spans import SPAN_SCHEMA, JsonText, span_batch
from agl_ray.spans.objects import span_object, span_row
from agl_ray.types import InputError, Span, from_json, to_json

SPAN = Span(
    rollout_id="ro-1",
    attempt_id="at-1",
    sequence_id=3,
    trace_id="t",
    span_id="s",
    parent_id="p",
    name="call",
    kind="call",
    status="ERROR",
    status_message="broke",
    attributes={"a": [1, None]},
    events=[{"name": "e"}],
    links=[{"span_id": "x"}],
    resource={"service": "agent"},
    start_time=1700000000.123456,
    end_time=1700000000.25,
    extra={"prompt_ids": [1, 2], "weight_versions": [(0, 7)], "model": "tiny"},
)


def test_there_and_back() -> None:
    row = span_row(SPAN)
    assert row["end_ns"] == 1_700_000_000_250_000_000
    assert abs(row["start_ns"] - 1_700_000_000_123_456_000) < 300
    assert span_object(row) == SPAN
    assert span_batch([row]).schema.equals(SPAN_SCHEMA)
    assert from_json(to_json(SPAN), Span).attributes == SPAN.attributes


def test_what_is_not_given_is_made() -> None:
    bare = Span(rollout_id="ro-1", attempt_id="at-1", name="step")
    row = span_row(bare)
    assert len(row["span_id"]) == 16
    assert row["start_ns"] == row["end_ns"] > 1_700_000_000_000_000_000
    assert (row["kind"], row["status"]) == ("span", "UNSET")
    again = span_object(row)
    assert (again.attributes, again.events, again.extra) == ({}, [], {})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "tool"}, "kind.*'call'.*'tool'"),
        ({"status": "fine"}, "status.*'UNSET'.*'fine'"),
        ({"extra": {"colour": 1}}, "extra.*'prompt_ids'.*'colour'"),
        ({"extra": {"span_id": "x"}}, "extra.*'span_id'"),
    ],
)
def test_what_does_not_fit_is_named(wrong: dict[str, Any], message: str) -> None:
    fields = {"rollout_id": "ro-1", "attempt_id": "at-1", "name": "x", **wrong}
    with pytest.raises(InputError, match=message):
        span_row(Span(**fields))


def test_json_that_is_written_already_is_taken_as_it_is() -> None:
    row = {"span_id": "s", "attributes": {"a": JsonText('{"b":1}'), "c": '{"b":1}'}}
    (stored,) = span_batch([row]).to_pylist()
    assert dict(stored["attributes"]) == {"a": '{"b":1}', "c": '"{\\"b\\":1}"'}
