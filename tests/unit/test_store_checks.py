"""What the store's checks let through and what they refuse."""

from __future__ import annotations

import time
from typing import Any

import pytest

from agl_ray.store.checks import MOST_DEPTH, check_depth, json_bytes
from agl_ray.types import InputError


def nested(depth: int) -> Any:
    value: Any = "x"
    for level in range(depth):
        value = [value] if level % 2 else {"k": value}
    return value


def test_depth() -> None:
    json_bytes("input", nested(MOST_DEPTH))
    with pytest.raises(InputError, match=f"input: expected at most {MOST_DEPTH}.*, got 201"):
        json_bytes("input", nested(MOST_DEPTH + 1))
    with pytest.raises(InputError, match="input: expected JSON values"):
        json_bytes("input", nested(100_000))


def test_brackets_in_text_are_no_depth() -> None:
    json_bytes("input", {"text": "[{" * 5000, '"[\\': ["\\", '"', '\\"[[[', "\\\\"] * 300})
    json_bytes("input", [[]] * 5000)
    check_depth("body", b'"' + b"[" * 1000 + b'"')
    with pytest.raises(InputError):
        check_depth("body", b"[" * 1000)


def test_depth_is_looked_at_in_linear_time() -> None:
    started = time.monotonic()
    for piece in (b'\\"', b'"', b"\\", b"x", b"["):
        body = b"[" * (MOST_DEPTH + 1) + b'"' + piece * 2_000_000
        with pytest.raises(InputError):
            check_depth("body", body)
    assert time.monotonic() - started < 60
