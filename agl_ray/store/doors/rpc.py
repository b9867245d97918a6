"""The call route: every command of the store over one POST, for our own client.

    POST /v1/agl/call/{command}    one command       msgpack both ways, see agl_ray.store.doors.wire
    POST /v1/agl/calls             many at once

A blocking command is a long poll; when its caller goes away it is cancelled, so that nobody who has left is given work. A store that
restarts is answered as `StoreAway`: the client repeats with the same ids. Commands of several callers travel on together where
the store is another process.
Who calls it: `agl_ray.store.doors.app`. Test alone: tests/unit/test_store_http.py.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Sequence
from typing import Any

from agl_ray.ops.asgi import (
    MAX_BODY,
    Gone,
    Receive,
    Scope,
    Send,
    read_body,
    respond,
    unless_gone,
)
from agl_ray.store.doors import wire
from agl_ray.store.doors.errors import status_of
from agl_ray.store.doors.messages import answer_message
from agl_ray.store.lane import ALONE, Lanes
from agl_ray.store.lane import Command as Given
from agl_ray.store.transport import GatheringTransport, StoreAway
from agl_ray.types import AglError, InputError

log = logging.getLogger("agl_ray.store")

ONE, MANY = "/v1/agl/call/", "/v1/agl/calls"
MSGPACK = "application/msgpack"
LANE_SECONDS = 60.0  # for the store's answer to commands of several callers


class CallRoute:
    """ASGI application over a transport; `max_body` bounds a request in bytes."""

    def __init__(self, transport: GatheringTransport, max_body: int = MAX_BODY) -> None:
        self._transport, self._max_body = transport, max_body
        self._lanes = Lanes(self._send)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        try:
            if scope["method"] != "POST":
                raise InputError(f"{path}: expected POST, got {scope['method']}")
            if (b"content-type", MSGPACK.encode()) not in scope["headers"]:
                raise InputError(f"{path}: expected a body of content-type {MSGPACK}")
            status, answer = 200, await self._answer(path, receive)
        except (AglError, StoreAway) as error:
            status, answer = status_of(error), wire.encode_error(error)
        except Gone:
            log.info("the caller of %s went away", path)
            return
        except Exception as error:
            log.exception("%s failed in the store", path)
            status, answer = 500, wire.encode_error(error)
        await respond(send, status, answer, MSGPACK)

    async def _answer(self, path: str, receive: Receive) -> bytes:
        if path == MANY:
            return await answer_message(self._many, await read_body(receive, self._max_body))
        name = path.removeprefix(ONE)
        command = wire.command_of(name)
        body = await read_body(receive, self._max_body)
        arguments, seconds = wire.decode_call(command, body)
        if command.blocks:
            work = self._transport.call(name, *arguments, seconds=seconds)
            return wire.encode_result(await unless_gone(work, receive))
        return wire.encode_result(await self._one(name, arguments, seconds, len(body)))

    def _one(self, name: str, arguments: list[Any], seconds: float, size: int) -> Awaitable[Any]:
        if name in ALONE or not self._transport.gathers():
            return self._transport.call(name, *arguments, seconds=seconds)
        given = (name, tuple(arguments))
        return self._lanes.call(given, given, size)

    async def _send(self, given: Sequence[Given], _again: Sequence[Given]) -> Sequence[Any]:
        return await self._transport.call_many(given, seconds=LANE_SECONDS)

    async def _many(self, given: list[Given], seconds: float) -> Sequence[Any]:
        return await self._transport.call_many(given, seconds=seconds)
