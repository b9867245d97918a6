"""The short way from a gateway to an engine replica: a TCP connection over which calls travel, token ids in, token ids out.

A call of a Serve handle costs about 0.7 ms of CPU time in the gateway and 1.3 ms in the replica whatever it carries, a message over a
connection a tenth of that. Serve goes on choosing the replica: the first call of a session goes through its handle, and the answer says where
the replica listens (`GenerateResult.door`); the session's later calls go straight there while that replica lives and has room for them.

    greeting   the key of the address (`agl_ray.store.link`, whose frames these are)
    call       WHOLE or STREAM, then a GenerateRequest
    answer     RESULT, then a GenerateResult; or CHUNK, then a GenerateChunk, as often as there are any, and END
               or FAILED, then what was raised; or BUSY: it has begun no work, ask Serve for another replica
    CANCEL     of the call with the same number; the end of the connection cancels all its calls

Called by: `actors/engine.py` (`EngineDoor`), `actors/gateway.py` (`EngineLinks`). Test alone: `pytest tests/unit/test_gateway_engine_link.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, NoReturn

import msgspec

from agl_ray.gateway.engine_api import GenerateChunk, GenerateRequest, GenerateResult, Place
from agl_ray.store.link import Address, Greeted, Link, LinkLost, Listener, connected
from agl_ray.types import EngineError, InputError, WaitTimeout

if TYPE_CHECKING:
    from agl_ray.gateway.roles import EngineClient

logger = logging.getLogger(__name__)

AGAIN_SECONDS = 30.0  # after a connection could not be made: until the next try
MOST_SESSIONS = 10_000  # whose replica is remembered; of others Serve is asked again
WHOLE, STREAM, CANCEL, RESULT, CHUNK, END, FAILED, BUSY = (
    b"w",
    b"s",
    b"x",
    b"r",
    b"c",
    b"e",
    b"f",
    b"b",
)

_encode = msgspec.msgpack.Encoder().encode
_request = msgspec.msgpack.Decoder(GenerateRequest).decode
_result = msgspec.msgpack.Decoder(GenerateResult).decode
_chunk = msgspec.msgpack.Decoder(GenerateChunk).decode
_failure = msgspec.msgpack.Decoder(tuple[str, str]).decode


class Busy(Exception):
    """The replica has as many calls as it takes; this one was not begun."""


# The replica's side.


class EngineDoor(Listener):
    """Where an engine replica takes calls without Serve's part in them, at most `most` at once. Use it on the engine's own event loop."""

    def __init__(self, engine: EngineClient, most: int) -> None:
        super().__init__(lambda key: _Caller(self, key))
        self.engine, self.most = engine, most
        self.running = 0

    async def place(self, host: str) -> Place | None:
        """Where it listens from now on; None where this machine has no such address: all calls come through Serve then."""
        try:
            return await self.open(host)
        except OSError as error:
            logger.warning("engine: every call goes through Serve, which is slower: %s", error)
            return None


class _Caller(Greeted):
    """A gateway's connection."""

    def __init__(self, door: EngineDoor, key: bytes) -> None:
        super().__init__(key)
        self._door = door
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def frame_received(self, number: int, body: bytes) -> None:
        kind = body[:1]
        if kind == CANCEL:
            if (task := self._tasks.get(number)) is not None:
                task.cancel()
        elif kind not in (WHOLE, STREAM):
            raise ValueError(f"{kind!r} is no kind of message; are both sides of one version?")
        elif self._door.running >= self._door.most:
            self.send(number, BUSY)
        else:
            self._door.running += 1
            loop = asyncio.get_running_loop()
            self._tasks[number] = loop.create_task(self._carry_out(number, kind, body))
            self._tasks[number].add_done_callback(lambda _: self._ended(number))

    def _ended(self, number: int) -> None:
        del self._tasks[number]
        self._door.running -= 1

    async def _carry_out(self, number: int, kind: bytes, body: bytes) -> None:
        engine = self._door.engine
        try:
            request = _request(memoryview(body)[1:])
            if kind == WHOLE:
                self.send(number, RESULT + _encode(await engine.generate(request)))
                return
            async with aclosing(engine.generate_stream(request)) as chunks:
                async for chunk in chunks:
                    self.send(number, CHUNK + _encode(chunk))
            self.send(number, END)
        except (EngineError, InputError) as error:
            self._fail(number, error)
        except Exception as error:  # a caller may not wait for an answer that does not come
            logger.exception("engine: a call failed unexpectedly")
            self._fail(number, EngineError(f"the engine failed: {error!r}"))

    def _fail(self, number: int, error: EngineError | InputError) -> None:
        kind = "InputError" if isinstance(error, InputError) else "EngineError"
        self.send(number, FAILED + _encode((kind, str(error))))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for task in self._tasks.values():
            task.cancel()


# The gateway's side.


class EngineLink(Link):
    """A connection to an `EngineDoor`. Calls raise what the engine raised (EngineError, InputError), Busy, or LinkLost where the connection
    ends first. Cancelling a call, or closing its stream early, aborts it in the engine."""

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        self._streams: dict[int, asyncio.Queue[bytes | None]] = {}

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        number = self._next_number()
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._send(number, WHOLE + _encode(request))
        try:
            body = await answer
        except asyncio.CancelledError:
            self._cancel(number)
            raise
        finally:
            self._waiting.pop(number, None)
        if body[:1] != RESULT:
            _raise(body)
        return _result(memoryview(body)[1:])

    async def generate_stream(
        self, request: GenerateRequest
    ) -> AsyncGenerator[GenerateChunk, None]:
        number = self._next_number()
        queue = self._streams[number] = asyncio.Queue()
        self._send(number, STREAM + _encode(request))
        kind = CHUNK
        try:
            while True:
                body = await queue.get()
                if body is None:
                    raise LinkLost("the connection ended in the middle of a stream")
                kind = body[:1]
                if kind == END:
                    return
                if kind != CHUNK:
                    _raise(body)
                yield _chunk(memoryview(body)[1:])
        finally:
            del self._streams[number]
            if kind == CHUNK:
                self._cancel(number)

    def frame_received(self, number: int, body: bytes) -> None:
        queue = self._streams.get(number)
        if queue is None:
            super().frame_received(number, body)
        else:
            queue.put_nowait(body)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for queue in self._streams.values():
            queue.put_nowait(None)

    def _cancel(self, number: int) -> None:
        if not self.lost:
            self._send(number, CANCEL)


def _raise(body: bytes) -> NoReturn:
    if body[:1] == BUSY:
        raise Busy
    kind, text = _failure(memoryview(body)[1:])
    raise InputError(text) if kind == "InputError" else EngineError(text)


class EngineLinks:
    """Which replica takes a session's calls, and the connections to the replicas.

    replicas: of the deployment. Where there is one, every session is at home there as soon as any answer has said where it listens."""

    def __init__(self, replicas: int) -> None:
        self._one = replicas == 1
        self._places: OrderedDict[str, Address] = OrderedDict()
        self._ways: dict[Address, _Way] = {}

    def of(self, session: str) -> EngineLink | None:
        """The connection to the session's replica; None: ask Serve, and have its answer `learn`t."""
        session = "" if self._one else session
        address = self._places.get(session)
        way = None if address is None else self._ways.get(address)
        if address is None or way is None:
            return None
        if way.over:
            del self._ways[address], self._places[session]
            return None
        return way.link

    def learn(self, session: str, place: Place | None) -> None:
        """Where the replica listens that answered a call of this session; None: nowhere."""
        if place is None:
            return
        address, session = Address(*place), "" if self._one else session
        self._places[session] = address
        self._places.move_to_end(session)
        if len(self._places) > MOST_SESSIONS:
            self._places.popitem(last=False)
        way = self._ways.get(address)
        if way is None or way.over:
            self._ways[address] = _Way(address)


class _Way:
    """The connection to one replica, from the wish for it to its end. link: None while it is being made, and where it cannot be."""

    def __init__(self, address: Address) -> None:
        self.link: EngineLink | None = None
        self._life = connected(address, EngineLink)
        self._again_at = float("inf")
        self._making = asyncio.get_running_loop().create_task(self._make())

    async def _make(self) -> None:
        try:
            self.link = await anext(self._life)
        except (OSError, WaitTimeout) as error:
            logger.warning(
                "calls of an engine replica go through Serve, which is slower: %s", error
            )
            self._again_at = time.monotonic() + AGAIN_SECONDS

    @property
    def over(self) -> bool:
        """Whether it has ended, or is to be tried again."""
        if self.link is None:
            return time.monotonic() >= self._again_at
        return self.link.lost
