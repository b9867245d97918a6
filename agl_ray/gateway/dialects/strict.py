"""Reading a request body strictly: what all dialects share.

Every field of a request either acts or is refused by name with status 400; nothing is ignored (contract 8). Called by: the
request modules beside this one. Test alone: `pytest tests/unit/test_gateway_chat.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

import msgspec

from agl_ray.gateway.canonical import Refusal

_PATH = re.compile(r" - at `\$\.?([^`]*)`")
_UNKNOWN = re.compile(r"unknown field `([^`]+)`")

MOST_ANSWERS = 64  # to one request

Body = TypeVar("Body")
Item = TypeVar("Item")

OnlyValues = Mapping[str, tuple[Callable[[Any], bool], str]]
"""Field -> (is this value the one that is taken?, what to do instead). A null counts as not given."""


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all request parts: an unknown field is an error."""


def read(decoder: msgspec.json.Decoder[Body], body: bytes) -> Body:
    """The decoded body; Refusal 400 that names the field which is wrong, or says why it is no JSON."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        refuse_invalid(str(error))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refusal(400, f"the request body is not valid JSON: {error}") from error
    except RecursionError as error:
        raise Refusal(400, "the request body is nested too deep") from error


def convert(value: Any, kind: type[Item], at: str) -> Item:
    """`value`, which is decoded JSON at the place `at` of the body, as a `kind`; Refusal 400 names the place inside it."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        refuse_invalid(str(error), at)


def only(body: Any, values: OnlyValues) -> None:
    """Refusal 400 where a field of `body` has a value that is not supported."""
    for field, (accepts, instead) in values.items():
        value = getattr(body, field)
        if value is not None and not accepts(value):
            refuse(field, f"{field}={shown(value)} is not supported: {instead}")


def several(n: int | None) -> int:
    """`n`, the answers that a request asks for."""
    if n is not None and not 1 <= n <= MOST_ANSWERS:
        refuse_value("n", f"expected 1 to {MOST_ANSWERS}, got {n}")
    return n or 1


def refuse(param: str, message: str, code: str = "unsupported_parameter") -> NoReturn:
    raise Refusal(400, message, param=param, code=code)


def refuse_value(param: str, message: str) -> NoReturn:
    """For a value that is wrong, where `refuse` is for one that is right but not supported."""
    raise Refusal(400, f"{param}: {message}", param=param, code="invalid_value")


def refuse_invalid(text: str, at: str = "") -> NoReturn:
    """A msgspec complaint as a refusal: the path inside the body becomes `param`."""
    inner = match.group(1) if (match := _PATH.search(text)) else ""
    path = _join(at, inner)
    reason = _PATH.sub("", text)
    if match := _UNKNOWN.search(text):
        param = _join(path, match.group(1))
        raise Refusal(
            400,
            f"unknown or unsupported field '{param}': leave it out; nothing is ignored here",
            param=param,
            code="unknown_parameter",
        )
    raise Refusal(400, f"{path or 'request'}: {reason}", param=path or None, code="invalid_value")


def given(**fields: Any) -> dict[str, Any]:
    """The fields that are not None."""
    return {key: value for key, value in fields.items() if value is not None}


def shown(value: Any) -> str:
    """A value as JSON text, for a message."""
    return msgspec.json.encode(value).decode()


def _join(outer: str, inner: str) -> str:
    if not outer or not inner or inner.startswith("["):
        return outer + inner
    return f"{outer}.{inner}"
