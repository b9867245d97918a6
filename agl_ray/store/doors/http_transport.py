"""HttpTransport: a LightningStore client reaches its store over HTTP, from outside the cluster.

What it is: each command is one POST to `/v1/agl/call/{command}`; connections are kept open, one session per event loop, closed with
the loop. A connection that fails, or a proxy that has no store behind it, is `StoreAway`: the client repeats the command with the
same ids, so nothing is done twice.
Who calls it: `LightningStore.http`. Test alone: tests/unit/test_store_http.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec

from agl_ray import waits
from agl_ray.store.doors import wire
from agl_ray.store.doors.messages import send_message
from agl_ray.store.doors.rpc import MANY, MSGPACK, ONE
from agl_ray.store.lane import Command
from agl_ray.store.transport import StoreAway
from agl_ray.types import Conflict, InputError, StoreError

CONNECT_SECONDS = 5.0
KEEP_ALIVE_SECONDS = 15.0  # idle connections; shorter than any server's own limit that we know of
ANSWER_SECONDS = 2.0  # for an answer on its way when the store's own deadline passes
LARGE = 2**20  # bytes: larger bodies are written piece by piece
_AWAY = frozenset({502, 503, 504})


class HttpTransport:
    """base_url: `http://host:port` of the store's door. api_key: its bearer key, if it has one. Picklable, key included."""

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"store address: expected http://host:port, got {base_url!r}")
        self.base_url, self._api_key = base_url.rstrip("/"), api_key
        self._sessions: dict[asyncio.AbstractEventLoop, _Session] = {}

    def __reduce__(self) -> Any:
        return (HttpTransport, (self.base_url, self._api_key))

    def gathers(self) -> bool:
        return True

    async def call(self, command: str, *arguments: Any, seconds: float) -> Any:
        """Raises the store's own error; StoreAway where no answer came; StoreError where something else answers there."""
        if command == "close":
            raise Conflict(
                f"store at {self.base_url}: it is ended by whoever started it, not over HTTP"
            )
        known = wire.command_of(command)
        content = await self._answer(
            ONE + command, command, wire.encode_call(command, arguments, seconds), seconds
        )
        with self._understood(command):
            return wire.decode_answer(known, content)

    async def call_many(self, commands: Sequence[Command], *, seconds: float) -> list[Any]:
        """Per command its result or its error, in one request."""
        words = f"{commands[0][0]} and {len(commands) - 1} more"

        async def carry(body: bytes) -> bytes:
            return await self._answer(MANY, words, body, seconds)

        with self._understood(words):
            return await send_message(carry, commands, seconds)

    async def _answer(self, path: str, words: str, body: bytes, seconds: float) -> bytes:
        on = f"the store at {self.base_url} to answer {words}"
        answer = self._post(path, body)
        status, kind, content = await waits.wait(answer, on=on, seconds=seconds + ANSWER_SECONDS)
        if kind != MSGPACK:
            raise self._no_store(status, content)
        return content

    @contextlib.contextmanager
    def _understood(self, words: str) -> Iterator[None]:
        try:
            yield
        except msgspec.MsgspecError as error:
            raise StoreError(
                f"store at {self.base_url}: its answer to {words} is not understood ({error}); "
                "are both sides of one version?"
            ) from error

    async def _post(self, path: str, body: bytes) -> tuple[int, str, bytes]:
        session = await self._session()
        data = io.BytesIO(body) if len(body) > LARGE else body
        try:
            async with session.post(self.base_url + path, data=data) as answer:
                return answer.status, answer.content_type, await answer.read()
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            raise StoreAway(f"{self.base_url}: {error or type(error).__name__}") from error
        except aiohttp.ClientError as error:
            raise StoreError(f"store at {self.base_url}: {error!r}") from error

    def _no_store(self, status: int, content: bytes) -> Exception:
        """What an answer that is not the call route's means."""
        text = content[:300].decode("utf-8", "replace")
        if status in (401, 403):
            return InputError(f"store at {self.base_url}: it wants another API key: {text}")
        if status == 413:
            return InputError(f"store at {self.base_url}: the call is too large for it: {text}")
        if status in _AWAY:
            return StoreAway(f"{self.base_url}: HTTP {status}: {text}")
        return StoreError(
            f"store at {self.base_url}: expected the door of a LightningStore there, got HTTP {status}: {text}"
        )

    async def _session(self) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        known = self._sessions.get(loop)
        if known is None:
            for ended in [one for one in list(self._sessions) if one.is_closed()]:
                self._sessions.pop(ended, None)
            known = self._sessions[loop] = _Session(self._api_key)
        return await known.get()

    async def close(self) -> None:
        """Close this loop's connections (those of other loops close with their loops); a later call opens new ones."""
        session = self._sessions.pop(asyncio.get_running_loop(), None)
        if session is not None:
            await session.close()


class _Session:
    """One aiohttp session that lives as long as its event loop: a suspended async generator holds it, and `asyncio.run` ends
    those when it ends."""

    def __init__(self, api_key: str | None) -> None:
        self._life = _life(api_key)
        self._opened: asyncio.Task[aiohttp.ClientSession] | None = None

    async def get(self) -> aiohttp.ClientSession:
        if self._opened is None:
            self._opened = asyncio.ensure_future(anext(self._life))
        return await asyncio.shield(self._opened)

    async def close(self) -> None:
        await self._life.aclose()


async def _life(api_key: str | None) -> AsyncGenerator[aiohttp.ClientSession, None]:
    headers = {"content-type": MSGPACK}
    if api_key is not None:
        headers["authorization"] = f"Bearer {api_key}"
    session = aiohttp.ClientSession(
        headers=headers,
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS),
        # The wait around each call has the deadline; long polls are idle for as long as they like.
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
        cookie_jar=aiohttp.DummyCookieJar(),
    )
    async with session:
        yield session
