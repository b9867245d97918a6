"""A model outside, over HTTP: one request in the canonical form, its answer in the canonical form, whole or streamed.

What differs between the APIs is an `Api` (upstream_openai.py, upstream_anthropic.py: pure, no I/O). Here is what they share: the limits
(calls at once, calls a minute), the deadline, trying again, and what counts as a failure. An answer that is not whole, or not one, is an
EngineError, never an empty answer. Called by: outside.py. Test alone: `pytest tests/unit/test_gateway_upstream.py` (a local HTTP server).
"""

from __future__ import annotations

import asyncio
import logging
import random
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import msgspec

from agl_ray.gateway.canonical import CallRequest, Refusal, ToolCall
from agl_ray.ops.pace import Pace
from agl_ray.types import EngineError
from agl_ray.waits import wait

logger = logging.getLogger(__name__)

FIRST_PAUSE = 0.5  # seconds before the second try where the endpoint names none; doubles
LONGEST_PAUSE = 20.0
MAX_LINE = 2**22  # bytes of one event of a stream
_CALLERS_FAULT = (400, 413, 422)
_PASSING = (408, 409, 425, 429)  # and everything from 500


class Outside(msgspec.Struct, frozen=True, kw_only=True):
    """An answer. Counts are the endpoint's own; None: it gave none."""

    content: str | None
    reasoning: str | None = None
    tool_calls: list[ToolCall] = []
    finish_reason: str
    """stop | length"""
    stop_string: str | None = None
    prompt_tokens: int | None = None
    response_tokens: int | None = None
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    model: str | None = None
    """What answered, in the endpoint's words."""


class Piece(msgspec.Struct, frozen=True):
    """News of a streamed answer."""

    text: str = ""
    reasoning: str = ""


class Reader(ABC):
    """Gathers one answer from its events. `finishes`: the API's words for an answer's end -> ours."""

    finishes: ClassVar[Mapping[str, str]]

    def __init__(self) -> None:
        self._text, self._reasoning = "", ""
        self._calls: dict[int, dict[str, str]] = {}
        self._finish: str | None = None
        self._stop: str | None = None
        self._usage: dict[str, Any] = {}
        self._model: str | None = None

    @abstractmethod
    def push(self, event: dict[str, Any]) -> Piece:
        """What the event says anew. EngineError where it says that the answer failed."""

    @abstractmethod
    def counts(self) -> dict[str, int | None]:
        """The counts of `Outside`, from the API's usage."""

    @property
    def ended(self) -> bool:
        """Whether the answer is whole."""
        return self._finish is not None

    def answer(self) -> Outside:
        """The whole answer. EngineError where it is cut off, filtered, or empty: never an empty answer."""
        finish = self.finishes.get(self._finish or "")
        if finish is None:
            raise EngineError(
                f"the endpoint's answer ended by {self._finish!r}; expected one of {', '.join(self.finishes)}"
            )
        if finish == "stop" and not (self._text or self._calls):
            raise EngineError("the endpoint's answer holds neither text nor a tool call")
        calls = [
            ToolCall(id=call["id"], name=call["name"], arguments=call["arguments"] or "{}")
            for _, call in sorted(self._calls.items())
        ]
        return Outside(
            content=self._text or (None if calls or self._reasoning else ""),
            reasoning=self._reasoning or None,
            tool_calls=calls,
            finish_reason=finish,
            stop_string=self._stop,
            model=self._model,
            **self.counts(),  # type: ignore[arg-type]
        )

    def _more(self, text: str, reasoning: str) -> Piece:
        self._text += text
        self._reasoning += reasoning
        return Piece(text, reasoning)

    @staticmethod
    def _failed(error: Any) -> EngineError:
        return EngineError(f"the endpoint failed in its answer: {str(error)[:500]}")


class Api(Protocol):
    """One API. `path` stands behind the base URL."""

    path: str

    def headers(self, key: str | None) -> dict[str, str]: ...

    def body(self, request: CallRequest, model: str, max_tokens: int) -> dict[str, Any]:
        """Refusal for what this API has no words for."""
        ...

    def whole(self, body: dict[str, Any]) -> Outside:
        """EngineError where the body is no answer."""
        ...

    def reader(self) -> Reader: ...


@dataclass(frozen=True, kw_only=True)
class UpstreamSettings:
    """See `RoleConfig` of agl_ray/config/roles.py."""

    role: str
    base_url: str
    model: str
    key: str | None = None
    requests_per_minute: float | None = None
    concurrency: int = 16
    max_tokens: int = 4096


class Busy(EngineError):
    """The endpoint did not answer, and may at another time. seconds: the pause that it asks for."""

    def __init__(self, message: str, seconds: float | None = None) -> None:
        super().__init__(message)
        self.seconds = seconds


class Upstream:
    """One endpoint, shared by all calls of this process. Used within one event loop."""

    def __init__(self, settings: UpstreamSettings, api: Api) -> None:
        self.settings, self._api = settings, api
        self.model = settings.model
        self._url = settings.base_url.rstrip("/") + api.path
        self._places = asyncio.Semaphore(settings.concurrency)
        per_minute = settings.requests_per_minute
        self._pace = Pace(per_minute) if per_minute else None
        self._session: Any = None

    async def whole(self, request: CallRequest, deadline: float) -> Outside:
        """The answer. deadline: on the loop's clock, tries and queueing included. Raises Refusal (the endpoint or its API refuses the
        request), EngineError, WaitTimeout."""
        body = self._body(request)
        pause = FIRST_PAUSE
        while True:
            try:
                async with self._turn(deadline), self._post(body, deadline) as response:
                    raw = await self._wait(response.read(), "answer", deadline)
                    with self._form():
                        return self._api.whole(_object(raw, self._named))
            except Busy as error:
                pause = await self._before_retry(error, pause, deadline)

    async def stream(
        self, request: CallRequest, deadline: float
    ) -> AsyncGenerator[Piece | Outside, None]:
        """As `whole`: pieces as they come, then the answer. Until the first piece a lost connection is tried again."""
        body = self._body(request)
        body["stream"] = True
        pause = FIRST_PAUSE
        while True:
            seen = False
            try:
                async with self._turn(deadline), self._post(body, deadline) as response:
                    reader = self._api.reader()
                    async with aclosing(self._events(response, deadline)) as events:
                        async for event in events:
                            with self._form():
                                piece = reader.push(event)
                            if piece.text or piece.reasoning:
                                seen = True
                                yield piece
                    if not reader.ended:
                        raise Busy(f"{self._named}: its stream ended before the answer did")
                    with self._form():
                        answer = reader.answer()
                    yield answer
                    return
            except Busy as error:
                if seen:
                    raise
                pause = await self._before_retry(error, pause, deadline)

    async def close(self) -> None:
        """Close its connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    # ---- one try ----

    @property
    def _named(self) -> str:
        return f"the endpoint of role {self.settings.role} ({self._url})"

    def _body(self, request: CallRequest) -> dict[str, Any]:
        asked = request.sampling.get("max_tokens") or self.settings.max_tokens
        return self._api.body(request, self.model, min(asked, self.settings.max_tokens))

    @contextmanager
    def _form(self) -> Iterator[None]:
        """What is not of the API's form is an EngineError that names the endpoint."""
        try:
            yield
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise EngineError(
                f"{self._named}: its answer is not of its API's form: {error!r}"
            ) from error
        except Busy:
            raise
        except EngineError as error:
            raise EngineError(f"{self._named}: {error}") from error

    async def _wait(self, awaitable: Any, what: str, deadline: float) -> Any:
        """Under the call's deadline; a broken connection is Busy."""
        import aiohttp

        left = deadline - asyncio.get_running_loop().time()
        try:
            return await wait(
                awaitable,
                on=f"{what} of {self._named}",
                seconds=max(left, 0.0),
                hint="gateway.call_timeout_seconds",
            )
        except (aiohttp.ClientError, ConnectionError, ValueError) as error:
            raise Busy(f"{self._named}: {what}: {error!r}") from error

    @asynccontextmanager
    async def _turn(self, deadline: float) -> AsyncIterator[None]:
        """A place among the calls at once, then a turn of the minute's."""
        limit = self.settings.concurrency
        await self._wait(self._places.acquire(), f"one of the {limit} places", deadline)
        try:
            if self._pace is not None:
                rate = f"a turn of the {self.settings.requests_per_minute:g} a minute"
                await self._wait(self._pace.turn(), rate, deadline)
            yield
        finally:
            self._places.release()

    @asynccontextmanager
    async def _post(self, body: dict[str, Any], deadline: float) -> AsyncIterator[Any]:
        """The response to a request, once its status is known to be good; closed at the end."""
        import aiohttp

        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=None, sock_read=None)
            self._session = aiohttp.ClientSession(timeout=timeout, read_bufsize=MAX_LINE)
        response = await self._wait(
            self._session.post(
                self._url,
                data=msgspec.json.encode(body),
                headers={
                    **self._api.headers(self.settings.key),
                    "content-type": "application/json",
                },
                allow_redirects=False,
            ),
            "the first byte",
            deadline,
        )
        try:
            if response.status != 200:
                raw = await self._wait(response.read(), "its error", deadline)
                raise self._error(response.status, response.headers, raw)
            yield response
        finally:
            response.close()

    def _error(self, status: int, headers: Any, raw: bytes) -> Exception:
        """What a status other than 200 means. The key is in no message."""
        said = raw[:2000].decode(errors="replace")
        try:
            found = msgspec.json.decode(raw).get("error")
            said = found["message"] if isinstance(found, dict) else str(found or said)
        except (msgspec.DecodeError, AttributeError, KeyError):
            logger.debug("%s: an error without words: %s", self._named, said)
        if self.settings.key:
            said = said.replace(self.settings.key, "***")
        message = f"{self._named} answered HTTP {status}: {said}"
        if status in _CALLERS_FAULT:
            return Refusal(400, message, code="refused_by_endpoint")
        if status in _PASSING or status >= 500:
            return Busy(message, _seconds(headers.get("retry-after")))
        return EngineError(message)

    async def _events(self, response: Any, deadline: float) -> AsyncGenerator[dict[str, Any], None]:
        """The data of server-sent events, until `[DONE]` or the end. Both APIs put an event's JSON on one line."""
        while line := await self._wait(response.content.readline(), "the next tokens", deadline):
            field, _, data = line.strip().partition(b":")
            if field != b"data":
                continue
            if data.strip() == b"[DONE]":
                return
            yield _object(data, self._named)

    async def _before_retry(self, error: Busy, pause: float, deadline: float) -> float:
        """Sleep as long as the endpoint asks for; the error itself where that is past the deadline. The next pause."""
        asked = pause * random.uniform(0.75, 1.25) if error.seconds is None else error.seconds
        if asyncio.get_running_loop().time() + asked >= deadline:
            raise error
        logger.warning("%s; tried again in %.1f s", error, asked)
        await asyncio.sleep(asked)
        return min(2 * pause, LONGEST_PAUSE)


def _object(raw: bytes, named: str) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        shown = raw[:200].decode(errors="replace")
        raise EngineError(f"{named}: expected JSON, got {shown!r}") from error
    if not isinstance(found, dict):
        raise EngineError(f"{named}: expected a JSON object, got {raw[:200]!r}")
    return found


def _seconds(header: str | None) -> float | None:
    """Retry-After in seconds; a date, which these APIs do not send, is passed over."""
    try:
        return max(float(header), 0.0) if header else None
    except ValueError:
        return None
