"""Attributes read in place: tables of several chunks and of slices, spans without attributes, and none at all."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
from learner_data import call, table

from agl_ray.spans import span_batch
from agl_ray.trajectory.attributes import Entry, entries


def found(spans: pa.Table, kind: str, *keys: str) -> list[Entry]:
    here = pc.equal(spans["kind"], kind)
    return entries(spans, here, lambda every: pc.is_in(every, pa.array(keys)))


ROWS = [
    call("a", [], [], attributes={"x": 1, "long": "text" * 100}),
    {**call("b", [], []), "kind": "span", "attributes": {"x": 2}},
    call("c", [], []),
    call("d", [], [], attributes={"y": "two", "x": None}),
]
EXPECTED = [(0, "x", "1"), (2, "y", '"two"'), (2, "x", "null")]


def test_the_entries_of_the_marked_spans_are_numbered_among_these() -> None:
    assert found(table(ROWS), "call", "x", "y") == EXPECTED
    assert found(table(ROWS), "span", "x", "y") == [(0, "x", "2")]


def test_however_the_table_is_cut() -> None:
    batches = [span_batch(ROWS[:1]), span_batch(ROWS[1:1]), span_batch(ROWS[1:])]
    assert found(pa.Table.from_batches(batches), "call", "x", "y") == EXPECTED
    longer = table([ROWS[3], *ROWS, ROWS[0]])
    assert found(longer.slice(1, 4), "call", "x", "y") == EXPECTED


def test_nothing_at_all() -> None:
    assert found(table([]), "call", "x") == []
    assert found(table(ROWS).slice(0, 0), "call", "x") == []
    assert found(table([ROWS[2]]), "call", "x") == []
