"""How commands of the store travel over HTTP: msgpack both ways, typed by the signatures of `StoreCore`.

    one     request   {"args": [...], "seconds": 60.0}
            answer    {"ok": result}   or   {"error": {"type": "NotFound", "text": "...", "arguments": [...]}}
    many    request   {"calls": [[command, [...]], ...], "seconds": 60.0}
            answer    {"answers": [an answer as above, ...]}   or   {"error": ...}

What it is: `commands()`, the table of every public coroutine of `StoreCore` with its argument and result types; the way there and
back of what msgpack lacks (UNSET, integers beyond 64 bits, Arrow buffers, exceptions).
Who calls it: `agl_ray.store.doors.rpc` (server), `agl_ray.store.doors.http_transport` (client). Test alone:
tests/unit/test_store_http.py.
"""

from __future__ import annotations

import functools
import inspect
import operator
import types
import typing
from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict, TypeVar

import msgspec
import pyarrow as pa
from msgspec import UNSET, UnsetType
from msgspec.msgpack import Ext

from agl_ray.store.away import StoreAway
from agl_ray.store.core import StoreCore
from agl_ray.store.payload import Payloads
from agl_ray.types import (
    AglError,
    AttemptStatus,
    InputError,
    NotFound,
    RolloutConfig,
    RolloutStatus,
    StoreError,
)

_UNSET, _BIG_INT = 1, 2  # codes of our msgpack extensions
_INT_RANGE = range(-(2**63), 2**64)
# The life of a store is its owner's business.
_NOT_COMMANDS = frozenset({"open", "close"})
_WAITS = frozenset(
    {"wait_seconds", "timeout", "expected_spans"}
)  # a command with such an argument may wait


class Failure(msgspec.Struct, tag_field="failure", tag="error"):
    """An exception on its way. arguments: what its class is called with to make it again, as pickle does."""

    type: str
    text: str
    arguments: list[str | int | float | bool | None]


class Command(NamedTuple):
    """arguments: an array-like struct of the parameters. result: what comes back. blocks: it may wait for an event."""

    arguments: msgspec.msgpack.Decoder
    answer: msgspec.msgpack.Decoder
    blocks: bool


R = TypeVar("R", bound="_Request | _Requests")


class RolloutChanges(TypedDict, total=False):
    """`fields` of `update_rollout`."""

    input: Any
    mode: str | None
    resources_id: str | None
    status: RolloutStatus
    config: RolloutConfig
    metadata: dict[str, Any] | None


class AttemptChanges(TypedDict, total=False):
    """`fields` of `update_attempt`."""

    status: AttemptStatus
    worker_id: str | None
    last_heartbeat_time: float
    metadata: dict[str, Any] | None


_CLOSER = {
    ("update_rollout", "fields"): RolloutChanges,
    ("update_attempt", "fields"): AttemptChanges,
}
"""Types of parameters that the signature leaves open."""


class _Request(msgspec.Struct):
    args: msgspec.Raw
    seconds: float


class _Requests(msgspec.Struct):
    calls: list[tuple[str, msgspec.Raw]]
    seconds: float


class _Answers(msgspec.Struct):
    answers: list[msgspec.Raw] = []
    error: Failure | None = None


@functools.cache
def commands() -> dict[str, Command]:
    """Every command of the store by name."""
    found = inspect.getmembers(StoreCore, inspect.iscoroutinefunction)
    return {
        name: _command(name, method)
        for name, method in found
        if not name.startswith("_") and name not in _NOT_COMMANDS
    }


def _command(name: str, method: Any) -> Command:
    hints = typing.get_type_hints(method)
    fields: list[Any] = []
    for parameter in list(inspect.signature(method).parameters.values())[1:]:
        kind = _CLOSER.get((name, parameter.name), hints[parameter.name])
        given = parameter.default is inspect.Parameter.empty
        fields.append(
            (parameter.name, kind) if given else (parameter.name, kind, parameter.default)
        )
    arguments = msgspec.defstruct(
        f"{name}_arguments", fields, array_like=True, forbid_unknown_fields=True
    )
    answer = msgspec.defstruct(
        f"{name}_answer",
        [("ok", _wire_type(hints["return"]) | UnsetType, UNSET), ("error", Failure | None, None)],
    )
    return Command(
        msgspec.msgpack.Decoder(arguments, ext_hook=_incoming),
        msgspec.msgpack.Decoder(answer, ext_hook=_incoming),
        any(parameter in _WAITS for parameter in inspect.signature(method).parameters),
    )


def _wire_type(kind: Any) -> Any:
    """`kind` with Failure where it has AglError."""
    if kind is AglError:
        return Failure
    if kind is None or kind is type(None):
        return None
    parts = typing.get_args(kind)
    if not parts:
        return kind
    replaced = tuple(_wire_type(part) for part in parts)
    if replaced == parts:
        return kind
    origin: Any = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return functools.reduce(operator.or_, replaced)
    return origin[replaced]


# Requests.


def encode_call(command: str, arguments: Sequence[Any], seconds: float) -> bytes:
    """The body of a request. InputError where an argument cannot travel."""
    return _encode_request(command, {"args": arguments, "seconds": seconds})


def encode_calls(calls: Sequence[tuple[str, Sequence[Any]]], seconds: float) -> bytes:
    """The body of a request of many commands. InputError where an argument cannot travel."""
    names = ", ".join(sorted({name for name, _ in calls}))
    return _encode_request(names, {"calls": calls, "seconds": seconds})


def _encode_request(what: str, request: dict[str, Any]) -> bytes:
    try:
        return _encode(request)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{what}: an argument cannot be sent to the store: {error}") from error


def command_of(name: str) -> Command:
    """NotFound where there is none of that name."""
    command = commands().get(name)
    if command is None:
        raise NotFound(
            f"command {name!r}: the store has none of that name; are both sides of one version?"
        )
    return command


def decode_call(command: Command, body: bytes) -> tuple[list[Any], float]:
    """(arguments, seconds that the caller waits). InputError says what does not fit."""
    request = _decode_request(body, _Request)
    return _arguments(command, request.args), request.seconds


def decode_calls(body: bytes) -> tuple[list[tuple[str, list[Any]] | AglError], float]:
    """(per command its name and arguments or what does not fit, seconds that the caller waits)."""
    request = _decode_request(body, _Requests)
    calls: list[tuple[str, list[Any]] | AglError] = []
    for name, given in request.calls:
        try:
            calls.append((name, _arguments(command_of(name), given)))
        except AglError as error:
            calls.append(error)
    return calls, request.seconds


def _decode_request(body: bytes, kind: type[R]) -> R:
    try:
        request = msgspec.msgpack.decode(body, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise InputError(f"body of the call: {error}") from error
    if not 0 < request.seconds < float("inf"):
        raise InputError(f"seconds: expected a positive number, got {request.seconds}")
    return request


def _arguments(command: Command, given: msgspec.Raw) -> list[Any]:
    try:
        return list(msgspec.structs.astuple(command.arguments.decode(given)))
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise InputError(f"arguments of the call: {error}") from error


# Answers.


def encode_result(result: Any) -> bytes:
    return _encode({"ok": result})


def encode_error(error: BaseException) -> bytes:
    return _encode({"error": failure_of(error)})


def encode_answers(results: Sequence[Any]) -> bytes:
    """Of many commands: per command its result or its exception."""
    answers = [
        encode_error(one) if isinstance(one, BaseException) else encode_result(one)
        for one in results
    ]
    return msgspec.msgpack.encode({"answers": [msgspec.Raw(one) for one in answers]})


def decode_answer(command: Command, body: bytes | msgspec.Raw) -> Any:
    """The result, or the store's own exception raised. msgspec.MsgspecError where this is no answer of a store."""
    answer = command.answer.decode(body)
    if answer.error is not None:
        raise error_of(answer.error)
    result = answer.ok
    if isinstance(result, Payloads):
        return result._replace(data=pa.py_buffer(result.data))
    if isinstance(result, list):
        return [error_of(one) if isinstance(one, Failure) else one for one in result]
    return result


def decode_answers(names: Sequence[str], body: bytes) -> list[Any]:
    """Per command its result or its exception; raises what befell the request as a whole."""
    answers = msgspec.msgpack.decode(body, type=_Answers)
    if answers.error is not None:
        raise error_of(answers.error)
    found: list[Any] = []
    for name, answer in zip(names, answers.answers, strict=True):
        try:
            found.append(decode_answer(command_of(name), answer))
        except (AglError, StoreAway, TypeError) as error:
            found.append(error)
    return found


def failure_of(error: BaseException) -> Failure:
    text = _sendable(str(error))
    reduced = error.__reduce__()
    given = reduced[1] if isinstance(reduced, tuple) else ()
    if not all(isinstance(one, (str, int, float, type(None))) for one in given):
        given = (text,)
    arguments = [_sendable(one) if isinstance(one, str) else one for one in given]
    return Failure(type(error).__name__, text, arguments)


def _sendable(text: str) -> str:
    """`text` without what UTF-8 cannot hold."""
    return text.encode("utf-8", "backslashreplace").decode()


def error_of(failure: Failure) -> Exception:
    """The exception, of its own type and with its own text; a StoreError where its type is none that we raise."""
    kind = _kinds().get(failure.type)
    unknown = StoreError(f"the store failed unexpectedly: {failure.type}: {failure.text}")
    try:
        return unknown if kind is None else kind(*failure.arguments)
    except TypeError:  # its class is made in another way
        return unknown


def _kinds() -> dict[str, type[Exception]]:
    found: dict[str, type[Exception]] = {
        kind.__name__: kind for kind in (StoreAway, TypeError, ValueError)
    }
    waiting: list[type[AglError]] = [AglError]
    while waiting:
        kind = waiting.pop()
        found[kind.__name__] = kind
        waiting += kind.__subclasses__()
    return found


# What msgpack lacks.


def _encode(value: Any) -> bytes:
    try:
        return msgspec.msgpack.encode(value, enc_hook=_outgoing)
    except OverflowError:  # rare: JSON values may have integers of any size
        kept = (bytes, bytearray, memoryview, UnsetType, pa.Buffer)
        plain = msgspec.to_builtins(value, builtin_types=kept, enc_hook=_outgoing)
        return msgspec.msgpack.encode(_marked(plain), enc_hook=_outgoing)


def _outgoing(value: Any) -> Any:
    if value is UNSET:
        return Ext(_UNSET, b"")
    if isinstance(value, pa.Buffer):
        return memoryview(value)
    if isinstance(value, BaseException):
        return failure_of(value)
    raise TypeError(f"expected values of JSON, bytes or records, got {type(value).__name__}")


def _marked(value: Any) -> Any:
    """`value` with an extension in the place of every integer beyond 64 bits."""
    if isinstance(value, int) and value not in _INT_RANGE:
        size = value.bit_length() // 8 + 1
        return Ext(_BIG_INT, value.to_bytes(size, "big", signed=True))
    if isinstance(value, dict):
        return {key: _marked(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_marked(one) for one in value]
    return value


def _incoming(code: int, data: memoryview) -> Any:
    if code == _UNSET:
        return UNSET
    if code == _BIG_INT:
        return int.from_bytes(data, "big", signed=True)
    raise ValueError(f"unknown extension {code}")
