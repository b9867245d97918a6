"""OpenTelemetry's attribute values as JSON values, both ways and without loss.

What it is: JSON has no bytes, no NaN and no infinities, so those are written as OTLP's own JSON writes them:
`{"bytesValue": base64}`, `{"doubleValue": "NaN"}`. A map that happens to look like one of these is wrapped as
`{"kvlistValue": {...}}`. Everything else is itself: text, booleans, integers (all 64 bits), finite floats, lists, maps, null.
Who calls it: `agl_ray.spans.otel` (SDK values), `agl_ray.spans.otlp` (protobuf). Test alone: tests/unit/test_spans_otel.py.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping, Sequence
from typing import Any

BYTES, DOUBLE, MAP = "bytesValue", "doubleValue", "kvlistValue"
_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def plain(value: Any) -> Any:
    """The JSON value of a Python value as OpenTelemetry's SDK holds it. What it does not know becomes its text."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, float):
        return plain_float(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return plain_bytes(bytes(value))
    if isinstance(value, Mapping):
        return plain_map({clean(str(key)): plain(item) for key, item in value.items()})
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    return clean(str(value))


def plain_float(value: float) -> Any:
    if math.isfinite(value):
        return value
    name = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return {DOUBLE: name}


def plain_bytes(value: bytes) -> dict[str, str]:
    return {BYTES: base64.b64encode(value).decode()}


def plain_map(items: dict[str, Any]) -> dict[str, Any]:
    """`items`, whose values are plain, wrapped where it would read as something else."""
    return {MAP: items} if items.keys() <= {BYTES, DOUBLE, MAP} and len(items) == 1 else items


def original(value: Any) -> Any:
    """The Python value that `plain` made: bytes, non-finite floats and wrapped maps come back; lists and maps all the way down."""
    if isinstance(value, list | tuple):
        return [original(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if len(value) == 1:
        ((key, item),) = value.items()
        if key == DOUBLE and isinstance(item, str) and item in _SPECIAL:
            return _SPECIAL[item]
        if key == MAP and isinstance(item, Mapping):
            return {name: original(part) for name, part in item.items()}
        if key == BYTES and isinstance(item, str):
            try:
                return base64.b64decode(item, validate=True)
            except binascii.Error:  # somebody's own map, written by a program that is not ours
                return dict(value)
    return {name: original(item) for name, item in value.items()}


def clean(text: str) -> str:
    """`text` without what UTF-8 cannot hold (lone surrogates become backslash escapes)."""
    return text.encode("utf-8", "backslashreplace").decode()
