"""What agents hand to emitters, as attribute values: numbers checked, nested things flattened, objects as JSON.

Called by emit.py and operation.py. Test alone: tests/unit/test_tracing_emit.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from agl_ray.spans.otel_values import plain
from agl_ray.types import InputError

_MOST_DEPTH = 16
_MOST_TEXT = 4096  # characters of an object that has no other form than its text


def finite_reward(value: Any) -> float:
    """`value` as a float; ValueError where it is no finite real number."""
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return float(value)
    if hasattr(value, "item") and getattr(value, "size", 2) == 1:  # a NumPy scalar
        return finite_reward(value.item())
    raise ValueError(f"reward: expected a finite number, got {value!r}")


def flatten(value: Any, name: str, depth: int = 0) -> dict[str, Any]:
    """{name: value}, where a map becomes `name.key` and a list that holds maps or lists `name.0`, all the way down."""
    if depth < _MOST_DEPTH:
        if isinstance(value, Mapping) and value:
            return _joined(value.items(), name, depth)
        if isinstance(value, list | tuple) and any(
            isinstance(item, Mapping | list | tuple) for item in value
        ):
            return _joined(enumerate(value), name, depth)
    return {name: leaf(value)}


def _joined(items: Any, name: str, depth: int) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in items:
        flat |= flatten(item, f"{name}.{key}" if name else str(key), depth + 1)
    return flat


def leaf(value: Any) -> Any:
    """A JSON value for anything: what has no JSON form becomes its text, cut at 4096 characters."""
    if value is None or isinstance(value, str | bool | int | float | bytes):
        return plain(value)
    if isinstance(value, list | tuple) and all(
        item is None or isinstance(item, str | bool | int | float) for item in value
    ):
        return plain(value)
    try:
        return to_json(value)
    except InputError:
        text = repr(value)
        return plain(text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}...")


def to_json(value: Any) -> Any:
    """`value` as JSON values: builtins, dataclasses, msgspec and pydantic models, NumPy arrays, dates, sets. InputError for the rest."""
    try:
        return plain(msgspec.to_builtins(value, str_keys=True, enc_hook=_builtins))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"expected an object that can be written as JSON, got {type(value).__name__}: {error}"
        ) from error


def _builtins(value: Any) -> Any:
    for method, options in (("model_dump", {"mode": "json"}), ("tolist", {})):
        convert = getattr(value, method, None)
        if callable(convert):
            return convert(**options)
    raise TypeError(f"{type(value).__name__} has no JSON form")
