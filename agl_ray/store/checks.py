"""Checks of what clients give the store: ids that fit in URLs and keys, values that fit in JSON, ends that agree.

Who calls it: `agl_ray.store.machine`, `agl_ray.store.client`. Test alone: tests/unit/test_store_machine.py.
"""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import msgspec

from agl_ray.types import Attempt, Conflict, EndReason, InputError

LATE = (EndReason.LOST, EndReason.TIMEOUT, EndReason.CANCELLED)
"""Ends that were decided over the runner's head: its own later report is answered with them, not refused."""

MOST_DEPTH = 200  # lists and objects in one another; pickle, which carries values to the store's actor, ends below 500

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# A text without an end is one, too: so the time stays linear in what is looked at.
_TEXTS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def check_id(field: str, value: str) -> None:
    """InputError where `value` cannot be an id (it goes into URLs and journal keys)."""
    if not is_id(value):
        raise InputError(
            f"{field}: expected 1 to 128 letters, digits or any of '._:-', got {value!r}"
        )


def check_worker(worker_id: str | None) -> None:
    if worker_id is not None:
        check_id("worker_id", worker_id)


def is_id(value: object) -> bool:
    """Whether a record may have this id."""
    return isinstance(value, str) and _ID.fullmatch(value) is not None


def check_text(field: str, value: str | None) -> None:
    """InputError where `value` cannot be a column of every journal: text that UTF-8 can hold, without NUL."""
    if value is None:
        return
    if not isinstance(value, str) or "\0" in value or not _writable(value):
        raise InputError(f"{field}: expected text without NUL and lone surrogates, got {value!r}")


def _writable(value: str) -> bool:
    return value.isascii() or clean_text(value) == value


def check_sequence(number: int) -> None:
    """InputError where `number` cannot be a span's place in its rollout."""
    if not isinstance(number, int) or not 1 <= number < 2**62:
        raise InputError(f"sequence_id: expected a number from 1 on, or None, got {number!r}")


def check_json(field: str, value: Any) -> None:
    """InputError where `value` cannot be written as JSON."""
    if value is not msgspec.UNSET:
        json_bytes(field, value)


def json_bytes(field: str, value: Any) -> bytes:
    try:
        body = msgspec.json.encode(value)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{field}: expected JSON values (numbers, text, lists, dictionaries with text keys), got "
            f"{type(value).__name__}: {error}"
        ) from error
    check_depth(field, body)
    return body


def check_depth(field: str, body: bytes) -> None:
    """InputError where lists and objects are nested too deeply in `body`, which is JSON."""
    if body.count(b"[") + body.count(b"{") <= MOST_DEPTH:
        return
    brackets = _TEXTS.sub(b"", body).translate(None, _NO_BRACKETS)
    depth = max(itertools.accumulate(1 if one in b"[{" else -1 for one in brackets), default=0)
    if depth > MOST_DEPTH:
        raise InputError(
            f"{field}: expected at most {MOST_DEPTH} values in one another, got {depth}"
        )


def check_dictionary(field: str, value: Any) -> None:
    """InputError where `value` is no dictionary of JSON values."""
    if not isinstance(value, dict):
        raise InputError(f"{field}: expected a dictionary, got {type(value).__name__}")
    json_bytes(field, value)


def check_record(field: str, record: Any) -> None:
    """InputError where a field of `record` has another type than its class says: it could not be read back."""
    try:
        msgspec.convert(msgspec.to_builtins(record), type(record))
    except (msgspec.ValidationError, TypeError, ValueError) as error:
        raise InputError(f"{field}: {error}") from error


def json_value(field: str, value: Any) -> Any:
    """`value` as it reads back from JSON, so that it is the same before and after a restart (tuples become lists)."""
    return msgspec.json.decode(json_bytes(field, value))


def check_end(attempt: Attempt, reason: EndReason, reward: float | None) -> None:
    """InputError where the reward is no number, Conflict where `attempt` already ended in another way."""
    if reason is EndReason.OK and reward is not None and not math.isfinite(reward):
        raise InputError(f"reward of an `ok` attempt: expected a finite number, got {reward}")
    if not attempt.status.final or attempt.end_reason in LATE:
        return
    if attempt.end_reason is reason and (reason is not EndReason.OK or attempt.reward == reward):
        return
    raise Conflict(
        f"attempt {attempt.attempt_id!r} of rollout {attempt.rollout_id!r} already ended {attempt.end_reason} with "
        f"reward {attempt.reward}; it cannot end {reason} with reward {reward}"
    )


def clean_text(text: str | None) -> str | None:
    """`text` without what UTF-8 cannot hold (an agent's output may carry any bytes): an error must not fail to be noted."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()
