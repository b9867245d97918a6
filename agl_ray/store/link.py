"""The short way to the store's process: one TCP connection per event loop, over which small commands travel.

A call of a Ray actor costs about 1.5 ms of CPU time whatever it carries, a message over a connection a tenth of that. Ray says where the
store listens and what key it expects (`Address`), so only who can call the actor can connect.

    greeting   length u32, 0, key              the first frame of a connection; another key ends it
    message    length u32, number u32, body    body: `wire.encode_calls`
    answer     length u32, number u32, body    body: `wire.encode_answers`; in any order

Who calls it: `agl_ray.store.transport` (the client's side), `actors.store` (the store's); the gateway's own short way to the engines
(`agl_ray.gateway.engine_link`) has the same frames and greeting. Test alone: tests/unit/test_store_link.py.
"""

from __future__ import annotations

import abc
import asyncio
import hmac
import logging
import secrets
import socket
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Any, NamedTuple, TypeVar, cast

from agl_ray import waits

log = logging.getLogger("agl_ray.store")

CONNECT_SECONDS = 5.0
LARGE = 64 * 1024  # bytes: a larger body is written by itself, not copied behind its head
KEY_BYTES = 32
MOST_BODY = 2**32 - 1
MOST_WAITING = 1024  # connections that the system holds for us
_HEAD = struct.Struct("<II")
# A machine that vanished sends nothing: after about 20 s without a sign of it the connection is lost.
_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}

Answer = Callable[[bytes], Awaitable[bytes]]


class Address(NamedTuple):
    host: str
    port: int
    key: bytes


class LinkLost(ConnectionError):
    """The connection ended before the answer came; whether the message was carried out is not known."""


class Frames:
    """Bytes as they come -> whole frames. most: bytes of the largest body; it may be raised while `feed` is read."""

    def __init__(self, most: int = MOST_BODY) -> None:
        self.most = most
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """The (number, body) of every frame that is complete now. ValueError where one is too large."""
        if not self._buffer and len(data) >= _HEAD.size:
            size, number = self._head(data, 0)
            if len(data) == _HEAD.size + size:  # nearly always
                yield number, data[_HEAD.size :]
                return
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= _HEAD.size:
            size, number = self._head(self._buffer, start)
            end = start + _HEAD.size + size
            if end > len(self._buffer):
                break
            body = bytes(memoryview(self._buffer)[start + _HEAD.size : end])
            start = end
            yield number, body
        del self._buffer[:start]

    def _head(self, data: bytes | bytearray, start: int) -> tuple[int, int]:
        size, number = _HEAD.unpack_from(data, start)
        if size > self.most:
            raise ValueError(f"a frame of {size} bytes: expected at most {self.most}")
        return size, number


def write_frame(transport: asyncio.Transport, number: int, body: bytes) -> None:
    head = _HEAD.pack(len(body), number)
    if len(body) > LARGE:
        transport.write(head)
        transport.write(body)
    else:
        transport.write(head + body)


def _stay_alive(transport: asyncio.Transport) -> None:
    one = transport.get_extra_info("socket")
    one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _ALIVE.items():
        if hasattr(socket, name):  # not every system has all of them
            one.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


# The store's side.


class Listener:
    """Listens, and has `caller` made with its key for every connection. Use it on one event loop."""

    def __init__(self, caller: Callable[[bytes], Greeted]) -> None:
        self._caller = caller
        self._opening = asyncio.Lock()
        self._server: asyncio.Server | None = None
        self._address: Address | None = None

    async def open(self, host: str) -> Address:
        """Where it listens: a free port of `host`. OSError where this machine has no such address."""
        async with self._opening:
            if self._address is None:
                key = secrets.token_bytes(KEY_BYTES)
                loop = asyncio.get_running_loop()
                self._server = await loop.create_server(
                    lambda: self._caller(key), host, 0, backlog=MOST_WAITING
                )
                port = self._server.sockets[0].getsockname()[1]
                self._address = Address(host, port, key)
            return self._address

    def close(self) -> None:
        """Listen no more; connections go on."""
        if self._server is not None:
            self._server.close()


class LinkDoor(Listener):
    """Answers messages by `answer`, begun in the order in which they came."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(lambda key: _Caller(answer, key))


class Greeted(asyncio.Protocol, abc.ABC):
    """A client's connection, at the side that listens: nothing but the key is read before the key was shown."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._frames = Frames(most=KEY_BYTES)
        self._greeted = False
        self._transport: asyncio.Transport | None = None

    @abc.abstractmethod
    def frame_received(self, number: int, body: bytes) -> None:
        """A message."""

    def send(self, number: int, body: bytes) -> None:
        """Nothing where the connection has ended."""
        if self._transport is not None:
            write_frame(self._transport, number, body)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by class
        _stay_alive(self._transport)

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        try:
            for number, body in self._frames.feed(data):
                if self._greeted:
                    self.frame_received(number, body)
                else:
                    self._greet(body)
        except ValueError as error:
            log.warning("a connection was ended: %s", error)
            self._transport.abort()

    def _greet(self, body: bytes) -> None:
        if not hmac.compare_digest(body, self._key):
            raise ValueError("it did not show the key")
        self._greeted, self._frames.most = True, MOST_BODY

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None


class _Caller(Greeted):
    """What is being carried out when its connection ends goes on: the client repeats it with the same ids."""

    def __init__(self, answer: Answer, key: bytes) -> None:
        super().__init__(key)
        self._answer = answer
        self._tasks: set[asyncio.Task[None]] = set()

    def frame_received(self, number: int, body: bytes) -> None:
        task = asyncio.get_running_loop().create_task(self._carry_out(number, body))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry_out(self, number: int, body: bytes) -> None:
        self.send(number, await self._answer(body))


# The client's side.

AnyLink = TypeVar("AnyLink", bound="Link")


class Link(asyncio.Protocol):
    """A connection to a `Listener`, of one event loop."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._frames = Frames()
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._number = 0
        self._transport: asyncio.Transport | None = None
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by class
        _stay_alive(self._transport)
        write_frame(self._transport, 0, self._address.key)

    def data_received(self, data: bytes) -> None:
        for number, body in self._frames.feed(data):
            self.frame_received(number, body)

    def frame_received(self, number: int, body: bytes) -> None:
        """An answer."""
        waiting = self._waiting.pop(number, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(body)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        why = (
            f"the connection to {self._address.host}:{self._address.port} ended: {exc or 'closed'}"
        )
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(LinkLost(why))
        self._waiting.clear()

    async def ask(self, body: bytes) -> bytes:
        """The answer to a message; LinkLost where the connection ends first."""
        number = self._next_number()
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._send(number, body)
        try:
            return await answer
        finally:
            self._waiting.pop(number, None)

    def _next_number(self) -> int:
        """Of a message; LinkLost where none can be sent."""
        if self.lost or self._transport is None:
            raise LinkLost("the connection has ended")
        self._number = (self._number + 1) % 2**32
        return self._number

    def _send(self, number: int, body: bytes) -> None:
        assert self._transport is not None
        write_frame(self._transport, number, body)


def linked(address: Address) -> AsyncGenerator[Link, None]:
    """`connected` to a store."""
    return connected(address, Link)


async def connected(
    address: Address, make: Callable[[Address], AnyLink]
) -> AsyncGenerator[AnyLink, None]:
    """Yields a connection once, and ends it when it is closed: `asyncio.run` does that for whoever is suspended in it when the loop ends.
    OSError or WaitTimeout where it cannot be made."""
    loop = asyncio.get_running_loop()
    connecting: Any = loop.create_connection(lambda: make(address), address.host, address.port)
    on = f"a connection to {address.host}:{address.port}"
    transport, link = await waits.wait(connecting, on=on, seconds=CONNECT_SECONDS)
    try:
        yield link
    finally:
        transport.abort()
