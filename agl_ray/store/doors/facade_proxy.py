"""The model calls of agent-lightning 1.0's agents: held while paused, forwarded to our gateway, streamed back.

What it is: `Pause`, the switch that a trainer turns while it updates weights, and `Proxy`, which forwards a call. As 1.0's proxy does, it
replaces the model that the agent asks for by the rollout's own (the gateway tells which), leaves the temperature to the run, and asks for
token ids (in train mode logprobs too). Unlike 1.0's, calls wait while paused instead of being answered 429, and streams pass through.
Both live in this process: one facade per run pauses its calls.
Who calls it: `agl_ray.store.doors.facade`. Test alone: tests/unit/test_store_facade.py.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Mapping
from typing import Any, TypeVar

import aiohttp
import msgspec

from agl_ray import waits
from agl_ray.ops.asgi import Receive, Send, unless_gone
from agl_ray.types import AglError, WaitTimeout

T = TypeVar("T")

PATHS = frozenset({"chat/completions", "completions"})
MODES = frozenset({"train", "val"})
CONNECT_SECONDS = 10.0
_MODELS = 10_000  # attempts whose model name is remembered
_PASSED_ON = ("accept", "traceparent", "tracestate", "baggage", "idempotency-key")
_PASSED_BACK = ("content-type", "retry-after", "x-request-id")


class Refused(AglError):
    """A call that is answered with this HTTP status instead of being forwarded; `body` None: the reason as 1.0 writes it."""

    def __init__(
        self,
        status: int,
        reason: str,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> None:
        super().__init__(reason)
        self.status, self.headers, self.body = status, dict(headers or {}), body


class PauseState(msgspec.Struct):
    """What /proxy/pause, /proxy/resume and /proxy/state answer."""

    paused: bool
    retry_after_seconds: int
    reason: str | None
    inflight: int


class Pause:
    """hold_seconds: how long a call waits for the end of a pause before it is answered 429."""

    def __init__(self, hold_seconds: float) -> None:
        self._hold_seconds = hold_seconds
        self._open = asyncio.Event()
        self._open.set()
        self._retry_after = 5
        self._reason: str | None = None
        self._reject = False
        self._inflight = 0

    def pause(self, retry_after_seconds: int, reason: str | None, reject: bool) -> None:
        """No call begins from now on; those under way go on. reject: answer 429 instead of holding calls."""
        self._open.clear()
        self._retry_after, self._reason, self._reject = retry_after_seconds, reason, reject

    def resume(self) -> None:
        self._reason = None
        self._open.set()

    def state(self) -> PauseState:
        return PauseState(not self._open.is_set(), self._retry_after, self._reason, self._inflight)

    async def enter(self) -> None:
        """Count a call as under way, once nothing is paused; Refused 429 where it may not begin."""
        while not self._open.is_set():
            if self._reject:
                raise self._refusal()
            on = f"the trainer to resume model calls (paused: {self._reason})"
            try:
                await waits.wait(self._open.wait(), on=on, seconds=self._hold_seconds)
            except WaitTimeout as error:
                raise self._refusal() from error
        self._inflight += 1

    def leave(self) -> None:
        self._inflight -= 1

    def _refusal(self) -> Refused:
        headers = {"retry-after": str(self._retry_after), "x-agl-paused": "true"}
        body = msgspec.json.encode({"error": "gateway paused", "reason": self._reason})
        return Refused(429, "gateway paused", headers, body)


class Call(msgspec.Struct):
    """One call: whose it is, what it asks, the headers it came with."""

    rollout_id: str
    attempt_id: str
    mode: str
    path: str
    body: dict[str, Any]
    headers: dict[str, str]


class Proxy:
    """gateway_url: of our gateway, without `/v1`; None: calls are answered 503. gateway_key: its bearer key, if it has one.
    call_seconds: for the gateway to begin an answer, and between two pieces of it."""

    def __init__(
        self, gateway_url: str | None, gateway_key: str | None, pause: Pause, call_seconds: float
    ) -> None:
        self._url = None if gateway_url is None else gateway_url.rstrip("/")
        self._key, self._seconds, self.pause = gateway_key, call_seconds, pause
        self._models: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._life = _session()
        self._opened: asyncio.Task[aiohttp.ClientSession] | None = None

    async def answer(self, call: Call, receive: Receive, send: Send) -> None:
        """Forward a call whose request has been read. Refused says what to answer instead; asgi.Gone: the caller left."""
        await unless_gone(self._answer(call, send), receive)

    async def _answer(self, call: Call, send: Send) -> None:
        if self._url is None:
            raise Refused(503, "no gateway: this store takes no model calls")
        await self.pause.enter()
        try:
            root = f"{self._url}/rollout/{call.rollout_id}/attempt/{call.attempt_id}/v1"
            model = await self._model(root, call)
            await self._forward(f"{root}/{call.path}", prepared(call, model), call, send)
        except aiohttp.ClientError as error:
            raise Refused(502, f"the gateway at {self._url}: {error!r}") from error
        except WaitTimeout as error:
            raise Refused(504, str(error)) from error
        finally:
            self.pause.leave()

    async def _model(self, root: str, call: Call) -> str:
        """The model name that calls of this attempt must ask for."""
        key = (call.rollout_id, call.attempt_id)
        known = self._models.get(key)
        if known is not None:
            return known
        got = await self._ask("GET", f"{root}/models", call, None)
        async with got:
            body = await self._soon(got.read())
        if got.status != 200:
            raise Refused(got.status, "the gateway refused the call", passed_back(got), body)
        try:
            known = msgspec.json.decode(body, type=_Models).data[0].id
        except (msgspec.MsgspecError, IndexError) as error:
            raise Refused(502, f"the gateway named no model for {root}: {error}") from error
        self._models[key] = known
        if len(self._models) > _MODELS:
            self._models.popitem(last=False)
        return known

    async def _forward(self, url: str, body: bytes, call: Call, send: Send) -> None:
        """A whole answer goes back whole, so that one that breaks off is a 502; a stream goes back as it comes."""
        got = await self._ask("POST", url, call, body)
        async with got:
            if got.content_type != "text/event-stream":
                content = await self._soon(got.read())
                await send_answer(send, got.status, passed_back(got), content)
                return
            head = [(name.encode(), text.encode()) for name, text in passed_back(got).items()]
            await send({"type": "http.response.start", "status": got.status, "headers": head})
            try:
                while piece := await self._soon(got.content.readany()):
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            except (aiohttp.ClientError, WaitTimeout) as error:
                # Too late for a status: OpenAI's clients raise on an event that holds an error.
                event = msgspec.json.encode(
                    {"error": {"message": str(error), "type": "server_error"}}
                )
                piece = b"data: " + event + b"\n\n"
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _ask(
        self, method: str, url: str, call: Call, body: bytes | None
    ) -> aiohttp.ClientResponse:
        if self._opened is None:
            self._opened = asyncio.ensure_future(anext(self._life))
        session = await asyncio.shield(self._opened)
        headers = {
            name: text
            for name, text in call.headers.items()
            if name in _PASSED_ON or name.startswith("x-stainless-")
        }
        headers["content-type"] = "application/json"
        if self._key is not None:
            headers["authorization"] = f"Bearer {self._key}"
        return await self._soon(session.request(method, url, data=body, headers=headers))

    async def _soon(self, work: Awaitable[T]) -> T:
        return await waits.wait(work, on=f"the gateway at {self._url}", seconds=self._seconds)


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


async def _session() -> AsyncGenerator[aiohttp.ClientSession, None]:
    """A session that lives as long as its event loop, which ends its suspended generators when it ends."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()
    ) as session:
        yield session


def prepared(call: Call, model: str) -> bytes:
    """The body as it goes to the gateway."""
    body = {key: value for key, value in call.body.items() if key != "temperature"}
    body |= {"model": model, "return_token_ids": True}
    if call.mode == "train" and call.path == "chat/completions":
        body["logprobs"] = True
    return msgspec.json.encode(body)


def passed_back(got: aiohttp.ClientResponse) -> dict[str, str]:
    return {name: got.headers[name] for name in _PASSED_BACK if name in got.headers}


async def send_answer(send: Send, status: int, headers: Mapping[str, str], body: bytes) -> None:
    head = [(name.encode(), text.encode()) for name, text in headers.items()]
    head.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})
