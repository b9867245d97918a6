"""Span payloads: an Arrow record batch without its schema, as it travels to the store and rests in the journal.

The schema message of SPAN_SCHEMA is 2 KB and the same for everybody, so a payload is the record-batch message alone; the
journal notes the schema's fingerprint once and refuses another. Sequence ids are not in the payload (the store
gives them out after it was made): `table_of` fills them in.
Who calls it: `agl_ray.store.client` (both ways), `agl_ray.store.journals` (fingerprint). Test alone: tests/unit/test_store_payload.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from agl_ray.spans import SPAN_SCHEMA, batch_from_ipc
from agl_ray.store.journals.base import AttemptKey, SpanRow
from agl_ray.types import InputError, StoreError

SCHEMA_PRINT = hashlib.sha256(SPAN_SCHEMA.to_string().encode()).hexdigest()[:16]
FEW = 8  # rows below which Arrow's `unique` costs more than it saves
SEQUENCE = SPAN_SCHEMA.get_field_index("sequence_id")


class Payloads(NamedTuple):
    """Payloads of several attempts on their way to a reader: `data` holds them end to end (it crosses processes without a
    copy), `places` has per payload (first sequence id, count, size in bytes), in the order asked for."""

    places: list[tuple[int, int, int]]
    data: Any  # pa.Buffer


def pack(batch: pa.RecordBatch | bytes, key: AttemptKey) -> tuple[bytes, int]:
    """(payload, number of spans). InputError where the batch has another schema, is empty, or is of another attempt."""
    if isinstance(batch, bytes):
        try:
            batch = batch_from_ipc(batch)
        except (pa.ArrowInvalid, ValueError, OSError) as error:
            raise InputError(
                f"span batch: expected an Arrow IPC stream with one batch: {error}"
            ) from error
    if not batch.schema.equals(SPAN_SCHEMA):
        raise InputError(
            "span batch: expected the columns of SPAN_SCHEMA; build it with agl_ray.spans.span_batch"
        )
    if batch.num_rows == 0:
        raise InputError("span batch: expected one row or more, got none")
    for column, (name, value) in enumerate(zip(("rollout_id", "attempt_id"), key, strict=True)):
        given = batch.column(column)
        others = set((given if len(given) <= FEW else given.unique()).to_pylist()) - {value}
        if others:
            raise InputError(
                f"span batch: {name} is {value!r} in the call and {others.pop()!r} in a row"
            )
    return batch.serialize().to_pybytes(), batch.num_rows


def join(rows: Sequence[SpanRow]) -> Payloads:
    """Rows of the journal, in order, for one answer."""
    places = [(row.first, row.number, len(row.payload)) for row in rows]
    return Payloads(places, pa.py_buffer(b"".join(row.payload for row in rows)))


def table_of(payloads: Sequence[Payloads]) -> pa.Table:
    """All spans as one table in SPAN_SCHEMA, sequence ids filled in, rows in the order of the payloads."""
    batches = [batch for one in payloads for batch in _batches(one)]
    return pa.Table.from_batches(batches, schema=SPAN_SCHEMA)


def _batches(payloads: Payloads) -> list[pa.RecordBatch]:
    batches, offset = [], 0
    for first, count, size in payloads.places:
        try:
            batch = pa.ipc.read_record_batch(payloads.data.slice(offset, size), SPAN_SCHEMA)
        except (pa.ArrowInvalid, OSError, EOFError) as error:
            raise StoreError(f"span payload at sequence {first} is damaged: {error}") from error
        ids = pa.array(np.arange(first, first + count))
        batches.append(batch.set_column(SEQUENCE, SPAN_SCHEMA.field(SEQUENCE), ids))
        offset += size
    return batches


def rows_of(table: pa.Table) -> list[dict[str, Any]]:
    """Plain Python rows: JSON columns decoded, `weight_versions` as (start, version) pairs."""
    return [_row(row) for row in table.to_pylist()]


def _row(row: dict[str, Any]) -> dict[str, Any]:
    for name in ("attributes", "resource"):
        if row[name] is not None:
            row[name] = {key: json.loads(value) for key, value in row[name]}
    for name in ("events", "links"):
        if row[name] is not None:
            row[name] = json.loads(row[name])
    if row["weight_versions"] is not None:
        row["weight_versions"] = [(run["start"], run["version"]) for run in row["weight_versions"]]
    return row
