"""What our HTTP doors share of ASGI: reading a bounded body, answering, noticing that the caller went away.

Called by: the gateway's HTTP surface (`agl_ray/gateway/http.py`) and the store's doors (`agl_ray/store/doors`). Test alone:
tests/unit/test_gateway_http.py, tests/unit/test_store_http.py.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeVar

from agl_ray.types import InputError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
T = TypeVar("T")

MAX_BODY = 64 * 2**20  # bytes of one request
JSON = "application/json"


class TooLarge(InputError):
    """A request body above the door's limit."""


class Gone(Exception):
    """The caller closed the connection."""


async def respond(send: Send, status: int, body: bytes, content_type: str = JSON) -> None:
    headers = [
        (b"content-type", content_type.encode()),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def read_body(receive: Receive, limit: int = MAX_BODY) -> bytes:
    """The whole body. TooLarge above `limit` bytes, Gone where the caller left."""
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > limit:
            raise TooLarge(f"request body: expected at most {limit} bytes, got more")
        if not message.get("more_body", False):
            return b"".join(pieces)


async def unless_gone(work: Awaitable[T], receive: Receive) -> T:
    """The result of `work`, whose request was read to its end; when the caller leaves it is cancelled and this raises Gone."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return await task
    finally:
        for one in (task, watch):
            if not one.done():
                one.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await one


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
