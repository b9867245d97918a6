"""An endpoint that watches: model calls of agents go through it to any OpenAI-compatible server, and each is a span of its attempt.

It has the gateway's paths (`/rollout/{id}/attempt/{id}[/role/{name}]/v1/...`) and changes nothing: headers, bodies and streams go through as
they are; only a role with a server of its own is called with that server's key. It lives in a thread of its own, so that an agent that
stands at a breakpoint holds nobody up. Called by `agl_ray.agents.dev`. Test alone: tests/unit/test_agents_dev.py.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from aiohttp import ClientConnectorError, ClientError, ClientSession, ClientTimeout, web

from agl_ray.gateway.caller import caller_of
from agl_ray.spans import KIND_CALL
from agl_ray.tracing import SpanRecorder
from agl_ray.types import RunError

CONNECT = 10.0  # seconds
START = 10.0
# Of one connection only (RFC 9110), or set anew by the next one.
_OWN = {"host", "connection", "keep-alive", "transfer-encoding", "content-length", "te", "upgrade"}
_OWN_BACK = {*_OWN, "content-encoding"}
# The last event of a stream, by the dialect's `type`; OpenAI's chat ends with the text [DONE].
_LAST = {"message_stop", "response.completed", "response.incomplete", "response.failed", "error"}
_LEFT = 499  # the status that servers log for a caller who left
_PATH = "/rollout/{rollout}/attempt/{attempt}{role:(/role/[^/]+)?}/v1/{path:.*}"
_KEYS = {"authorization", "x-api-key"}


@dataclass(frozen=True)
class Server:
    """Where calls go. base_url: with its `/v1`; headers: lower case, in place of the caller's own and of the caller's key."""

    base_url: str
    headers: Mapping[str, str] = field(default_factory=dict)


class WatchedEndpoint:
    """Context manager; `url` is what an `LLM` resource takes as its endpoint. base_url: the server's, with its `/v1`. servers: of roles
    that have one of their own."""

    def __init__(self, base_url: str, servers: Mapping[str, Server] | None = None) -> None:
        self._base = base_url.rstrip("/")
        self._servers = dict(servers or {})
        self._recorders: dict[tuple[str, str], SpanRecorder] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._runner: web.AppRunner | None = None
        self._client: ClientSession | None = None
        self.url = ""

    def __enter__(self) -> WatchedEndpoint:
        self._thread.start()
        self.url = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(START)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(START)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(START)
        self._loop.close()

    def watch(self, recorder: SpanRecorder) -> None:
        """Calls of this attempt go into `recorder` from now on; those of an attempt that nobody watches are refused."""
        self._recorders[recorder.rollout_id, recorder.attempt_id] = recorder

    async def _start(self) -> str:
        self._client = ClientSession(timeout=ClientTimeout(total=None, connect=CONNECT))
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", _PATH, self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        return f"http://{host}:{port}"

    async def _stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        if self._client is not None:
            await self._client.close()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        match = request.match_info
        recorder = self._recorders.get((match["rollout"], match["attempt"]))
        if recorder is None:
            return _error(404, f"no rollout {match['rollout']} runs here")
        call = _Call(request, recorder)
        server = self._servers.get(call.role or "")
        base = self._base if server is None else server.base_url.rstrip("/")
        own = {} if server is None else server.headers
        left = _OWN if server is None else _OWN | _KEYS | own.keys()
        headers = {k: v for k, v in request.headers.items() if k.lower() not in left}
        try:
            return await self._forward(request, f"{base}/{match['path']}", {**headers, **own}, call)
        except ClientConnectorError as error:
            call.end(502)
            return _error(502, f"nothing answers at {base}: {error.strerror or error}")
        except (ClientError, TimeoutError) as error:
            call.end(502)
            return _error(502, f"{base}: {type(error).__name__}: {error}")

    async def _forward(
        self, request: web.Request, url: str, headers: dict[str, str], call: _Call
    ) -> web.StreamResponse:
        if self._client is None:
            raise RunError("the endpoint is not started")
        body = await request.read()
        async with self._client.request(
            request.method, url, params=request.query, data=body or None, headers=headers
        ) as got:
            back = {k: v for k, v in got.headers.items() if k.lower() not in _OWN_BACK}
            if got.content_type != "text/event-stream":
                content = await got.read()
                call.read(content)
                call.end(got.status)
                return web.Response(body=content, status=got.status, headers=back)
            answer = web.StreamResponse(status=got.status, headers=back)
            await answer.prepare(request)
            try:
                async for line in got.content:
                    # Recorded before the agent sees the end: with it in hand, it may return and end the recording.
                    if line.startswith(b"data:") and call.read(line[5:]):
                        call.end(got.status)
                    await answer.write(line)
                call.end(got.status)
                await answer.write_eof()
            except ConnectionResetError:
                call.end(_LEFT)
            return answer


class _Call:
    """One call: what is learnt of it from its answer, in any of the dialects, whole or streamed."""

    def __init__(self, request: web.Request, recorder: SpanRecorder) -> None:
        self._recorder, self._started = recorder, time.time_ns()
        self._counts = request.method == "POST"
        self._path = request.match_info["path"]
        self._caller = caller_of(
            (name.lower().encode(), value.encode()) for name, value in request.headers.items()
        )
        self.role = request.match_info["role"].removeprefix("/role/") or None
        self._tokens: dict[str, int] = {}
        self._facts: dict[str, Any] = {}

    def read(self, content: bytes) -> bool:
        """Take up model, usage and finish reason from an answer, or from an event of a stream; whether it was a stream's last event."""
        try:
            said = json.loads(content)
        except ValueError:  # an answer that is no JSON
            return content.strip() == b"[DONE]"
        if not isinstance(said, dict):
            return False
        for part in (said, said.get("response"), said.get("message"), said.get("delta")):
            if isinstance(part, dict):
                self._take(part)
        for choice in said.get("choices") or []:
            if isinstance(choice, dict) and choice.get("finish_reason"):
                self._facts["finish_reason"] = str(choice["finish_reason"])
        return said.get("type") in _LAST

    def _take(self, part: dict[str, Any]) -> None:
        usage = part.get("usage")
        for name in ("prompt_tokens", "input_tokens"):
            self._count("prompt_tokens", usage, name)
        for name in ("completion_tokens", "output_tokens"):
            self._count("response_tokens", usage, name)
        if isinstance(part.get("model"), str):
            self._facts["model"] = part["model"]
        if isinstance(part.get("stop_reason"), str):
            self._facts["finish_reason"] = part["stop_reason"]

    def _count(self, column: str, usage: Any, name: str) -> None:
        if isinstance(usage, dict) and isinstance(usage.get(name), int):
            self._tokens[column] = usage[name]

    def end(self, status: int) -> None:
        """Record the call, once; GETs (the list of models) are none."""
        if not self._counts or self._recorder.closed:
            return
        self._counts = False
        good = status < 400
        self._recorder.add(
            name=self._path,
            kind=KIND_CALL,
            start_ns=self._started,
            end_ns=time.time_ns(),
            role=self.role,
            status="OK" if good else "ERROR",
            status_message=None if good else f"HTTP {status}",
            **self._place(),
            **self._tokens,
            **self._facts,
        )

    def _place(self) -> dict[str, str]:
        """The columns of its parent, where the client said inside of which span it called."""
        root = f"{self._recorder.root.span_id:016x}"
        if self._caller is None or self._caller.parent_id == root:
            return {}
        return self._caller._asdict()


def _error(status: int, text: str) -> web.Response:
    return web.json_response({"error": {"message": text, "type": "api_error"}}, status=status)
