"""The gateway's HTTP surface: a bare ASGI application over a Door.

    POST /rollout/{id}/attempt/{id}[/role/{role}]/v1/chat/completions     and .../v1/completions  .../v1/responses  .../v1/messages
    POST .../v1/messages/count_tokens     GET .../v1/models     GET .../state     GET /healthz

Called by: `actors/gateway.py` (Ray Serve), or any ASGI server. No framework: a request costs no routing table, no pydantic. What
differs between the APIs is in the table of dialects, the error bodies included. A path with `/v1` twice is taken for one with it
once: the base URL of an LLM resource ends in `/v1`, and Anthropic's client adds its own. Where the run has a key, all but /healthz asks for
it (`Authorization: Bearer` or `x-api-key`). The headers `anthropic-version` and `anthropic-beta` are accepted and change nothing; `traceparent` makes
the call's span a child of the caller's (caller.py). When the caller goes away the call is cancelled, by us or by the server, and
with it the engine's work. Test alone: `pytest tests/unit/test_gateway_http.py`.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

import msgspec

from agl_ray.gateway.caller import CallPath, caller_of
from agl_ray.gateway.canonical import CallRequest, CallResult, Refusal
from agl_ray.gateway.dialects import chat_answer, messages
from agl_ray.gateway.dialects.table import CHAT, DIALECTS, MESSAGES, Dialect, StreamWriter
from agl_ray.gateway.door import Door
from agl_ray.gateway.many import answers, pieces
from agl_ray.gateway.render import Renderer
from agl_ray.ops.asgi import MAX_BODY, Gone, Receive, Scope, Send, TooLarge, read_body, unless_gone

logger = logging.getLogger(__name__)

COUNT_TOKENS = "v1/messages/count_tokens"
_GET = ("v1/models", "state")
_JSON = [(b"content-type", b"application/json")]
# A limit of the attempt: OpenAI's and Anthropic's clients would try again, twice.
_NEVER_AGAIN = [*_JSON, (b"x-should-retry", b"false")]
_SSE = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class GatewayApp:
    """The ASGI application; see the module's text. on_start: awaited before the first request; where it fails the server does not start.
    api_key: what callers must show; None: anything. watches: it looks for callers who go away; a server that cancels their calls itself
    (Ray Serve) spares it that."""

    def __init__(
        self,
        door: Door,
        renderer: Renderer,
        on_start: Callable[[], Awaitable[None]] | None = None,
        api_key: str | None = None,
        watches: bool = True,
    ) -> None:
        self._door, self._renderer, self._on_start = door, renderer, on_start
        self._watches = watches
        self._api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        path, action = _route([part for part in scope["path"].split("/") if part], scope)
        dialect = _dialect(action, scope)
        try:
            await self._answer(scope, path, action, receive, send)
        except Refusal as refusal:
            headers = _NEVER_AGAIN if refusal.status == 429 else _JSON
            await _respond(send, refusal.status, dialect.error(refusal), headers)
        except Gone:
            logger.info("caller of %s went away", scope["path"])
        except Exception:
            logger.exception("call of %s failed in the gateway", scope["path"])
            failure = Refusal(500, "the gateway failed; its log says why", kind="server_error")
            await _respond(send, failure.status, dialect.error(failure))
            raise

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            kind = (await receive())["type"]
            if kind == "lifespan.startup" and self._on_start is not None:
                try:
                    await self._on_start()
                except Exception as error:
                    logger.exception("the gateway does not start")
                    await send({"type": f"{kind}.failed", "message": str(error)})
                    return
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return

    async def _answer(
        self, scope: Scope, path: CallPath | None, action: str, receive: Receive, send: Send
    ) -> None:
        if action == "healthz":
            await _respond(send, 200, b'{"status":"ok"}')
            return
        if self._api_key is not None:
            _check_key(self._api_key, dict(scope.get("headers") or ()))
        if path is None or action not in (*DIALECTS, COUNT_TOKENS, *_GET):
            raise Refusal(
                404,
                f"{scope['path']}: expected /rollout/ID/attempt/ID[/role/ROLE]/ and one of "
                + ", ".join((*DIALECTS, COUNT_TOKENS, *_GET)),
                code="unknown_url",
            )
        method, expected = scope["method"], "GET" if action in _GET else "POST"
        if method != expected:
            raise Refusal(
                405, f"{action}: expected {expected}, got {method}", code="method_not_allowed"
            )
        if action == "state":
            await _respond(send, 200, msgspec.json.encode(await self._door.state(path)))
        elif action == "v1/models":
            await _respond(send, 200, chat_answer.models_body(await self._door.model(path)))
        elif action == COUNT_TOKENS:
            counted = await self._door.count(path, messages.parse_count(await _body(receive)))
            await _respond(send, 200, msgspec.json.encode({"input_tokens": counted}))
        else:
            dialect = DIALECTS[action]
            request = dialect.parse(await _body(receive))
            handler = self._stream if request.stream else self._whole
            work = handler(dialect, path, request, send)
            await (unless_gone(work, receive) if self._watches else work)

    async def _whole(
        self, dialect: Dialect, path: CallPath, request: CallRequest, send: Send
    ) -> None:
        results = await answers(self._door, path, request)
        tokens = [
            self._renderer.token_texts(result.response_ids) if request.logprobs else None
            for result in results
        ]
        await _respond(send, 200, dialect.whole(request, results, tokens))

    async def _stream(
        self, dialect: Dialect, path: CallPath, request: CallRequest, send: Send
    ) -> None:
        """SSE. The status is sent with the first event, so what is refused before that has its own status; an error after
        that is an event, which the dialect's clients raise."""
        started = False
        async with aclosing(self._events(dialect, path, request)) as events:
            async for event in events:
                if not started:
                    started = True
                    head = {"type": "http.response.start", "status": 200, "headers": _SSE}
                    await send(head)
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(
        self, dialect: Dialect, path: CallPath, request: CallRequest
    ) -> AsyncGenerator[bytes, None]:
        writer: StreamWriter | None = None
        begun = False
        try:
            async with aclosing(pieces(self._door, path, request)) as stream:
                async for piece in stream:
                    if writer is None:
                        if isinstance(piece, CallResult):
                            raise AssertionError("a stream begins with its call's id")
                        writer = dialect.stream(request, piece)
                        continue
                    if not begun and (
                        isinstance(piece, CallResult) or piece.text or piece.reasoning
                    ):
                        begun = True
                        for event in writer.begin():
                            yield event
                    if isinstance(piece, CallResult):
                        events = writer.end(piece)
                    else:
                        events = writer.piece(piece)
                    for event in events:
                        yield event
        except Refusal as refusal:
            if writer is None or not begun:
                raise
            yield writer.error(refusal)


def _route(parts: list[str], scope: Scope) -> tuple[CallPath | None, str]:
    """(whose call, what of it) of a URL's path segments."""
    if len(parts) < 5 or parts[0] != "rollout" or parts[2] != "attempt":
        return None, "/".join(parts)
    role, rest = None, parts[4:]
    if rest[0] == "role" and len(rest) > 2:
        role, rest = rest[1], rest[2:]
    if rest[:2] == ["v1", "v1"]:
        rest = rest[1:]
    caller = caller_of(scope.get("headers") or ())
    return CallPath(parts[1], parts[3], role, caller), "/".join(rest)


def _dialect(action: str, scope: Scope) -> Dialect:
    """Whose error bodies the caller of this URL can read."""
    if action == COUNT_TOKENS:
        return MESSAGES
    headers = dict(scope.get("headers") or ())
    return DIALECTS.get(action, MESSAGES if b"anthropic-version" in headers else CHAT)


def _check_key(expected: bytes, headers: dict[bytes, bytes]) -> None:
    """Refusal 401 unless one of the headers that clients put their key in has this one; the time it takes says nothing about it."""
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    bearer = token.strip() if scheme.lower() == b"bearer" else b""
    right = [hmac.compare_digest(one, expected) for one in (bearer, headers.get(b"x-api-key", b""))]
    if not any(right):
        raise Refusal(
            401,
            "this gateway asks for a key, and the call's is not it: send the api_key of the attempt's LLM resource "
            "(Authorization: Bearer, or x-api-key)",
            code="invalid_api_key",
            kind="authentication_error",
        )


async def _body(receive: Receive) -> bytes:
    try:
        return await read_body(receive, MAX_BODY)
    except TooLarge as error:
        raise Refusal(413, str(error), code="too_large") from error


async def _respond(
    send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]] = _JSON
) -> None:
    sized = [*headers, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": sized})
    await send({"type": "http.response.body", "body": body})
