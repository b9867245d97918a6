"""Rows to an Arrow batch: missing columns become nulls, unknown ones are refused."""

from __future__ import annotations

import functools
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from agl_ray.spans.schema import SPAN_SCHEMA

_NAMES = frozenset(SPAN_SCHEMA.names)
_TYPES = [(field.name, field.type) for field in SPAN_SCHEMA]
FEW = 8  # rows
_MAPS = ("attributes", "resource")
_JSON = ("events", "links")


def new_span_id() -> str:
    """16 hex digits, as OpenTelemetry's."""
    return secrets.token_hex(8)


def span_batch(rows: Sequence[Mapping[str, Any]]) -> pa.RecordBatch:
    """A batch in SPAN_SCHEMA from dictionaries keyed by column name.

    `attributes` and `resource` are dictionaries of JSON values, `events` and `links` lists of JSON values;
    `weight_versions` is a list of (start, version). ValueError names an unknown column.
    """
    for row in rows:
        unknown = row.keys() - _NAMES
        if unknown:
            raise ValueError(
                f"span column {sorted(unknown)[0]!r}: expected one of {sorted(_NAMES)}"
            )
    arrays = [_column(name, kind, rows) for name, kind in _TYPES]
    return pa.RecordBatch.from_arrays(arrays, schema=SPAN_SCHEMA)


def _column(name: str, kind: pa.DataType, rows: Sequence[Mapping[str, Any]]) -> pa.Array:
    # Most columns of a lone span are empty: that costs a tenth of what making them from Nones does. (Slices of long columns of this
    # kind would carry all their rows.)
    if len(rows) <= FEW and all(row.get(name) is None for row in rows):
        return _nulls(kind, len(rows))
    return pa.array([_value(name, row.get(name)) for row in rows], kind)


@functools.lru_cache(maxsize=256)
def _nulls(kind: pa.DataType, number: int) -> pa.Array:
    return pa.nulls(number, kind)


def _value(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name in _MAPS:
        return [(key, json.dumps(item)) for key, item in value.items()]
    if name in _JSON:
        return json.dumps(value)
    if name == "weight_versions":
        return [{"start": start, "version": version} for start, version in value]
    return value
