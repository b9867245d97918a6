"""Records of the store as columns of an Arrow table, and back.

What it is: a record's fields become columns of the same names: text, whole numbers and floats as they are (times in seconds since the
epoch), enums as text, everything else (inputs, metadata, configurations, resources) as JSON text. Spans keep SPAN_SCHEMA, with the
batch they came in beside it.
Who calls it: `agl_ray.store.export`, `agl_ray.store.importing`. Test alone: tests/unit/test_store_export.py.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin

import msgspec
import pyarrow as pa

from agl_ray.spans import SPAN_SCHEMA
from agl_ray.types import Attempt, InputError, ResourcesUpdate, Rollout, Worker

_PLAIN = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
BATCH_ID = pa.field("batch_id", pa.string())
SPANS = pa.schema([*SPAN_SCHEMA, BATCH_ID])
"""SPAN_SCHEMA, and the batch that a span came to the store in (null: not known)."""

STATE = pa.schema([pa.field("key", pa.string(), nullable=False), pa.field("value", pa.binary())])


class Column(NamedTuple):
    name: str
    of: pa.DataType
    is_json: bool


class RecordTable:
    """One kind of record as a table. extra: int64 columns that the record does not have."""

    def __init__(self, kind: type[Any], extra: Sequence[str] = ()) -> None:
        self.kind, self.extra = kind, tuple(extra)
        self.columns = [_column(one) for one in msgspec.structs.fields(kind)]
        self.schema = pa.schema(
            [
                *(pa.field(one.name, one.of) for one in self.columns),
                *(pa.field(name, pa.int64()) for name in extra),
            ]
        )

    def table(self, records: Iterable[tuple[Any, ...]]) -> pa.Table:
        """From (record, value of each extra column ...)."""
        values: dict[str, list[Any]] = {name: [] for name in self.schema.names}
        for record, *others in records:
            for column in self.columns:
                value = getattr(record, column.name)
                if column.is_json and value is not None:
                    value = msgspec.json.encode(value).decode()
                values[column.name].append(value)
            for name, value in zip(self.extra, others, strict=True):
                values[name].append(value)
        return pa.table(values, schema=self.schema)

    def records(self, batch: pa.RecordBatch) -> list[tuple[Any, ...]]:
        """What `table` was given. InputError names the column or the row that does not fit."""
        missing = [one.name for one in self.columns if one.name not in batch.schema.names]
        if missing:
            raise InputError(f"column {missing[0]!r} is missing; there are {batch.schema.names}")
        return [self._record(row) for row in batch.to_pylist()]

    def _record(self, row: dict[str, Any]) -> tuple[Any, ...]:
        fields = {}
        try:
            for column in self.columns:
                value = row[column.name]
                if column.is_json:
                    value = None if value is None else msgspec.json.decode(value)
                fields[column.name] = value
            record = msgspec.convert(fields, self.kind)
        except (msgspec.MsgspecError, TypeError) as error:
            raise InputError(
                f"a {self.kind.__name__} in it does not fit: {error}: {str(row)[:200]}"
            ) from error
        return (record, *(row.get(name) for name in self.extra))


def _column(field: msgspec.structs.FieldInfo) -> Column:
    is_union = get_origin(field.type) in (Union, UnionType)
    kinds = get_args(field.type) if is_union else (field.type,)
    kinds = tuple(one for one in kinds if one is not type(None))
    kind = kinds[0] if len(kinds) == 1 else None
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        kind = str
    plain = _PLAIN.get(kind) if isinstance(kind, type) else None
    return Column(field.name, pa.string() if plain is None else plain, plain is None)


ROLLOUTS = RecordTable(Rollout, ("created", "queue_position"))
"""created: ordinal of creation. queue_position: place in the queue, 0 where the rollout does not wait."""
ATTEMPTS = RecordTable(Attempt)
RESOURCES = RecordTable(ResourcesUpdate, ("update_number",))
"""update_number: rises with every update of any snapshot; the highest is the latest."""
WORKERS = RecordTable(Worker)
