"""How the facade of agent-lightning 1.0 reads requests and writes answers: JSON, and `{"detail": ...}` for every error.

Who calls it: `agl_ray.store.doors.facade`. Test alone: tests/unit/test_store_facade.py.
"""

from __future__ import annotations

import logging
from typing import Any, TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from agl_ray.ops.asgi import (
    App,
    Gone,
    Receive,
    Scope,
    Send,
    read_body,
)
from agl_ray.store.checks import check_id
from agl_ray.store.doors.errors import status_of
from agl_ray.store.doors.facade_proxy import Refused, send_answer
from agl_ray.types import InputError

log = logging.getLogger("agl_ray.store")
T = TypeVar("T")

JSON = {"content-type": "application/json"}


async def read(request: Request, kind: type[T]) -> T:
    """InputError (422) where the body does not fit."""
    body = await read_body(request.receive)
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.MsgspecError as error:
        raise InputError(f"request body: {error}") from error


def number(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name, str(default))
    try:
        return int(text)
    except ValueError as error:
        raise InputError(f"{name}: expected an integer, got {text!r}") from error


def is_id(value: str) -> bool:
    """Whether a rollout or attempt may be called so; the store is not asked for anything else."""
    try:
        check_id("id", value)
    except InputError:
        return False
    return True


def answer(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def detail(text: str) -> bytes:
    return msgspec.json.encode({"detail": text.encode("utf-8", "backslashreplace").decode()})


async def refuse(request: Request, error: Exception) -> Response:
    """1.0's error body; what it calls unprocessable (422) is an InputError here."""
    status = 422 if type(error) is InputError else status_of(error)
    return Response(detail(str(error)), status, media_type="application/json")


async def no_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    return Response(detail(f"{request.method} {request.url.path}: {error}"), status, JSON)


class ModelCalls:
    """The proxy's route as a bare ASGI application: it streams, and notices that the caller left."""

    def __init__(self, forward: App) -> None:
        self._forward = forward

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._forward(scope, receive, send)
        except Gone:
            log.info("the caller of %s went away", scope["path"])
        except Refused as error:
            body = error.body or detail(str(error))
            await send_answer(send, error.status, JSON | error.headers, body)
        except msgspec.MsgspecError as error:
            body = detail(f"request body: expected a JSON object: {error}")
            await send_answer(send, 400, JSON, body)
