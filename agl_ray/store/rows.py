"""Records of the store as rows of a journal, and back.

Who calls it: `agl_ray.store.base`, `agl_ray.store.loading`, `agl_ray.store.reads`. Test alone: tests/unit/test_store_rows.py.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from agl_ray.store.journals.base import Row
from agl_ray.types import Attempt, ResourcesUpdate, Rollout, StoreError, Worker

T = TypeVar("T")

TYPES: dict[str, type[Any]] = {
    "rollout": Rollout,
    "attempt": Attempt,
    "resources": ResourcesUpdate,
    "worker": Worker,
}
_DECODERS = {kind: msgspec.json.Decoder(of) for kind, of in TYPES.items()}


def row_of(kind: str, key: str, position: int, record: Any, created: int = 0) -> Row:
    """A record as the journal keeps it; of kind `state` the bytes as they are. `created`: a rollout's ordinal."""
    if kind == "state":
        return Row(kind, key, position, (), record)
    return Row(kind, key, position, _columns(kind, record, created), msgspec.json.encode(record))


def _columns(kind: str, record: Any, created: int) -> tuple[Any, ...]:
    """The values of `COLUMNS[kind]`, enums as plain text."""
    if kind == "rollout":
        times = (record.start_time, record.end_time)
        return (created, record.status.value, record.mode, *times, record.resources_id)
    if kind == "attempt":
        reason = None if record.end_reason is None else record.end_reason.value
        ids, times = (record.rollout_id, record.attempt_id), (record.start_time, record.end_time)
        return (*ids, record.status.value, reason, record.worker_id, *times)
    if kind == "resources":
        return (record.version, record.create_time, record.update_time)
    return (record.status,)  # worker


def record_of(row: Row, of: type[T]) -> T:
    """The record in `row`; StoreError where its body is damaged."""
    try:
        record: T = _DECODERS[row.kind].decode(row.body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StoreError(
            f"store journal: record {row.key!r} of table {row.kind!r} is damaged: {error}; restore the journal from a copy, or "
            "start a new run"
        ) from error
    return record
