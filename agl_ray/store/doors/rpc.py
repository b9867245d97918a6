"""The call route: every command of the store over one POST, for our own client.

    POST /v1/agl/call/{command}    msgpack, see agl_ray.store.doors.wire

A blocking command is a long poll; when its caller goes away it is cancelled, so that nobody who has left is given work. A store that
restarts is answered as `StoreAway`: the client repeats with the same ids.
Who calls it: `agl_ray.store.doors.app`. Test alone: tests/unit/test_store_http.py.
"""

from __future__ import annotations

import logging

from agl_ray.store.doors import wire
from agl_ray.store.doors.asgi import (
    MAX_BODY,
    Gone,
    Receive,
    Scope,
    Send,
    read_body,
    respond,
    status_of,
    unless_gone,
)
from agl_ray.store.transport import StoreAway, Transport
from agl_ray.types import AglError, NotFound

log = logging.getLogger("agl_ray.store")

PATH = "/v1/agl/call/"
MSGPACK = "application/msgpack"


class CallRoute:
    """ASGI application over a transport; `max_body` bounds a request in bytes."""

    def __init__(self, transport: Transport, max_body: int = MAX_BODY) -> None:
        self._transport, self._max_body = transport, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = scope["path"].removeprefix(PATH)
        try:
            status, answer = await self._answer(name, scope["method"], receive)
        except Gone:
            log.info("the caller of %s went away", name)
            return
        await respond(send, status, answer, MSGPACK)

    async def _answer(self, name: str, method: str, receive: Receive) -> tuple[int, bytes]:
        try:
            if method != "POST":
                return 405, wire.encode_error(
                    NotFound(f"{PATH}{name}: expected POST, got {method}")
                )
            command = wire.commands().get(name)
            if command is None:
                raise NotFound(
                    f"command {name!r}: this store has none of that name; are both sides of one version?"
                )
            body = await read_body(receive, self._max_body)
            arguments, seconds = wire.decode_call(command, body)
            work = self._transport.call(name, *arguments, seconds=seconds)
            result = await (unless_gone(work, receive) if command.blocks else work)
            return 200, wire.encode_result(result)
        except (AglError, StoreAway) as error:
            return status_of(error), wire.encode_error(error)
        except Gone:
            raise
        except Exception as error:
            log.exception("command %s failed in the store", name)
            return 500, wire.encode_error(error)
