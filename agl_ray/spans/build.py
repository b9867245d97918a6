"""Rows to an Arrow batch: missing columns become nulls, unknown ones are refused."""

from __future__ import annotations

import functools
import json
import secrets
import struct
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from agl_ray.spans.schema import SPAN_SCHEMA

_NAMES = frozenset(SPAN_SCHEMA.names)
_TYPES = [(field.name, field.type) for field in SPAN_SCHEMA]
_PACKED = {"prompt_ids": "i", "response_ids": "i", "response_logprobs": "f"}
"""Columns of long lists of numbers -> how `struct` writes one of them."""
_REPEATED = frozenset(
    (
        "rollout_id",
        "attempt_id",
        "name",
        "kind",
        "status",
        "role",
        "model",
        "dialect",
        "finish_reason",
    )
)
"""Columns of text that is the same in span after span."""
SHORT = 200  # characters of a text that is kept for the next span
FEW = 8  # rows of a shared empty column: slices of a longer one would carry all its rows
_MAPS = ("attributes", "resource")
_JSON = ("events", "links")


class JsonText(str):
    """An attribute's value that is JSON text already: `span_batch` takes it as it is."""


def new_span_id() -> str:
    """16 hex digits, as OpenTelemetry's."""
    return secrets.token_hex(8)


def span_batch(rows: Sequence[Mapping[str, Any]]) -> pa.RecordBatch:
    """A batch in SPAN_SCHEMA from dictionaries keyed by column name.

    `attributes` and `resource` are dictionaries of JSON values, `events` and `links` lists of JSON values;
    `weight_versions` is a list of (start, version). ValueError names an unknown column.
    """
    given = set().union(*rows)
    if not given <= _NAMES:
        raise ValueError(f"span column {min(given - _NAMES)!r}: expected one of {sorted(_NAMES)}")
    arrays = [
        _nulls(name, len(rows))
        if name not in given and len(rows) <= FEW
        else _column(name, kind, rows)
        for name, kind in _TYPES
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=SPAN_SCHEMA)


def _column(name: str, kind: pa.DataType, rows: Sequence[Mapping[str, Any]]) -> pa.Array:
    if len(rows) == 1:
        (value,) = (row.get(name) for row in rows)
        if name in _REPEATED and type(value) is str and len(value) <= SHORT:
            return _repeated(value)
        if name in _PACKED:
            packed = _packed(kind, _PACKED[name], value)
            if packed is not None:
                return packed
    return pa.array([_value(name, row.get(name)) for row in rows], kind)


@functools.lru_cache(maxsize=1024)
def _repeated(value: str) -> pa.Array:
    """A column of one short text: columns do not change, so that spans may share them."""
    return pa.array([value], pa.string())


@functools.lru_cache(maxsize=1024)
def _nulls(name: str, number: int) -> pa.Array:
    """An empty column: it costs a tenth of what making it from Nones does."""
    return pa.nulls(number, SPAN_SCHEMA.field(name).type)


def _packed(kind: pa.DataType, code: str, values: Any) -> pa.Array | None:
    """One list of numbers, or array of them, as a column, in a third of the time that Arrow takes for thousands of Python numbers. None
    where they are no plain numbers of this kind: Arrow says what is wrong with them."""
    data: bytes | array[Any]
    if isinstance(values, array) and values.typecode == code:
        data = values
    elif isinstance(values, (list, tuple)):
        try:
            data = struct.pack(f"{len(values)}{code}", *values)
        except (struct.error, OverflowError):
            return None
    else:
        return None
    numbers = pa.Array.from_buffers(kind.value_type, len(values), [None, pa.py_buffer(data)])
    ends = pa.py_buffer(struct.pack("2i", 0, len(values)))
    return pa.Array.from_buffers(kind, 1, [None, ends], children=[numbers])


def _value(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name in _MAPS:
        return [
            (key, item if isinstance(item, JsonText) else json.dumps(item))
            for key, item in value.items()
        ]
    if name in _JSON:
        return json.dumps(value)
    if name == "weight_versions":
        return [{"start": start, "version": version} for start, version in value]
    return value
