"""Span payloads: what goes in comes out, with sequence ids; what does not fit is refused by name."""

from __future__ import annotations

import pyarrow as pa
import pytest

from agl_ray.spans import SPAN_SCHEMA, batch_to_ipc, span_batch
from agl_ray.store.journals.base import SpanRow
from agl_ray.store.payload import join, pack, rows_of, table_of
from agl_ray.types import InputError, StoreError

KEY = ("ro-1", "at-1")


def spans(number: int, start: int = 0, key: tuple[str, str] = KEY) -> pa.RecordBatch:
    return span_batch(
        [
            {
                "rollout_id": key[0],
                "attempt_id": key[1],
                "span_id": f"s{start + i}",
                "name": "chat",
                "kind": "call",
                "start_ns": 1,
                "end_ns": 2,
                "status": "OK",
                "attributes": {"n": start + i},
                "events": [{"e": 1}],
                "prompt_ids": list(range(i)),
                "weight_versions": [(0, 7)],
            }
            for i in range(number)
        ]
    )


def row(batch: pa.RecordBatch | bytes, first: int) -> SpanRow:
    payload, number = pack(batch, KEY)
    return SpanRow("b", KEY, first, number, payload)


def test_round_trip_with_sequence_ids() -> None:
    first, second = spans(3), spans(2, start=3)
    table = table_of([join([row(first, 1), row(batch_to_ipc(second), 4)])])
    assert table.schema.equals(SPAN_SCHEMA)
    assert table["sequence_id"].to_pylist() == [1, 2, 3, 4, 5]
    plain = pa.Table.from_batches([first, second]).drop(["sequence_id"])
    assert table.drop(["sequence_id"]).equals(plain)
    read = rows_of(table)
    assert read[4]["attributes"] == {"n": 4}
    assert read[4]["events"] == [{"e": 1}]
    assert read[4]["weight_versions"] == [(0, 7)]


def test_a_slice_carries_only_its_rows() -> None:
    many = spans(1000)
    payload, number = pack(many.slice(10, 2), KEY)
    assert number == 2
    assert len(payload) < 10_000
    table = table_of([join([SpanRow("b", KEY, 1, number, payload)])])
    assert table["span_id"].to_pylist() == ["s10", "s11"]


def test_nothing_is_an_empty_table() -> None:
    assert table_of([]).num_rows == table_of([join([])]).num_rows == 0


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (b"rubbish", "Arrow IPC"),
        (spans(0), "one row"),
        (pa.RecordBatch.from_pydict({"x": [1]}), "SPAN_SCHEMA"),
        (spans(1, key=("ro-2", "at-1")), "ro-2"),
        (spans(1, key=("ro-1", "at-9")), "at-9"),
    ],
)
def test_what_does_not_fit_is_refused(batch: pa.RecordBatch | bytes, text: str) -> None:
    with pytest.raises(InputError, match=text):
        pack(batch, KEY)


def test_damage_is_named() -> None:
    good = row(spans(2), 1)
    damaged = good._replace(payload=b"\0" * len(good.payload))
    with pytest.raises(StoreError, match="sequence 1"):
        table_of([join([damaged])])
