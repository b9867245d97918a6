"""Batches as Arrow IPC stream bytes: how small batches travel inside an actor call and rest in the journal."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

from agl_ray.spans.schema import SPAN_SCHEMA


def batch_to_ipc(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def batch_from_ipc(payload: bytes) -> pa.RecordBatch:
    """The single batch in `payload`; ValueError where it holds none or several."""
    batches = list(pa.ipc.open_stream(payload))
    if len(batches) != 1:
        raise ValueError(f"span payload: expected 1 record batch, got {len(batches)}")
    return batches[0]


def table_from_ipc(payloads: Iterable[bytes]) -> pa.Table:
    """All batches of all payloads as one table in SPAN_SCHEMA, zero-copy over the given bytes."""
    batches = [batch for payload in payloads for batch in pa.ipc.open_stream(payload)]
    return pa.Table.from_batches(batches, schema=SPAN_SCHEMA)
