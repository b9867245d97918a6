"""HTTP: routes, statuses, error bodies, server-sent events, callers who leave. No server: the ASGI application is called."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from agl_ray.gateway.caller import CallPath
from agl_ray.gateway.canonical import CallRequest, CallResult, Refusal, Streamed
from agl_ray.gateway.http import GatewayApp

URL = "/rollout/ro-1/attempt/at-1/v1/chat/completions"
BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def result() -> CallResult:
    return CallResult(
        call_id="c1",
        created=1,
        content="ok",
        tool_calls=[],
        finish_reason="stop",
        prompt_ids=[1],
        response_ids=[2],
        logprobs=[-0.5],
        weight_versions=[(0, 0)],
    )


class FakeDoor:
    """Answers "ok" to everybody; `error` is raised instead, in a stream after the first piece where `late`."""

    def __init__(self, error: Exception | None = None, late: bool = False) -> None:
        self.error, self.late = error, late
        self.paths: list[CallPath] = []
        self.cancelled = False
        self.hold: asyncio.Event | None = None

    async def call(self, path: CallPath, request: CallRequest) -> CallResult:
        self.paths.append(path)
        if self.error:
            raise self.error
        if self.hold:
            try:
                await self.hold.wait()
            except asyncio.CancelledError:
                self.cancelled = True
                raise
        return result()

    async def call_stream(self, path: CallPath, request: CallRequest) -> AsyncIterator[Any]:
        if self.error and not self.late:
            raise self.error
        yield Streamed(call_id="c1", created=1, prompt_ids=[1])
        yield Streamed(text="o", token_ids=[2])
        if self.error:
            raise self.error
        yield Streamed(text="k")
        yield result()

    async def model(self, path: CallPath) -> str:
        return "tiny"

    async def state(self, path: CallPath) -> dict[str, Any]:
        return {"calls": 3}


class FakeText:
    def token_texts(self, ids: list[int]) -> list[str]:
        return ["x"] * len(ids)


def call(
    door: FakeDoor, method: str, path: str, body: bytes = b"", leave: asyncio.Event | None = None
) -> tuple[int | None, bytes, dict[str, str]]:
    """(status, body, headers) of one request; with `leave`, the caller goes away when it is set."""
    sent: list[Any] = []

    async def run() -> None:
        incoming = [{"type": "http.request", "body": body[:5], "more_body": True}]
        incoming.append({"type": "http.request", "body": body[5:], "more_body": False})

        async def receive() -> Any:
            if incoming:
                return incoming.pop(0)
            await (leave or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        app = GatewayApp(door, FakeText())  # type: ignore[arg-type]
        await app({"type": "http", "method": method, "path": path}, receive, send)

    asyncio.run(run())
    status = next((m["status"] for m in sent if m["type"] == "http.response.start"), None)
    headers = {
        key.decode(): value.decode()
        for m in sent
        if m["type"] == "http.response.start"
        for key, value in m["headers"]
    }
    return status, b"".join(m.get("body", b"") for m in sent), headers


def post(
    door: FakeDoor, path: str = URL, **fields: Any
) -> tuple[int | None, bytes, dict[str, str]]:
    return call(door, "POST", path, json.dumps({**BODY, **fields}).encode())


def test_routes() -> None:
    door = FakeDoor()
    status, body, headers = post(door)
    assert (status, headers["content-type"]) == (200, "application/json")
    assert json.loads(body)["choices"][0]["message"]["content"] == "ok"
    assert post(door, "/rollout/ro-1/attempt/at-1/role/planner/v1/chat/completions")[0] == 200
    assert [path.role for path in door.paths] == [None, "planner"]
    assert (
        json.loads(call(door, "GET", "/rollout/r/attempt/a/v1/models")[1])["data"][0]["id"]
        == "tiny"
    )
    assert json.loads(call(door, "GET", "/rollout/r/attempt/a/state")[1]) == {"calls": 3}
    assert call(door, "GET", "/healthz")[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", URL, 405),
        ("POST", "/v1/chat/completions", 404),
        ("POST", "/rollout/r/attempt/a/v1/embeddings", 404),
        ("GET", "/", 404),
    ],
)
def test_wrong_urls(method: str, path: str, status: int) -> None:
    found, body, _ = call(FakeDoor(), method, path, b"{}")
    assert found == status
    assert json.loads(body)["error"]["message"]


def test_errors_are_openais() -> None:
    status, body, _ = post(FakeDoor(Refusal(409, "not live", code="attempt_not_live")))
    assert status == 409
    assert json.loads(body) == {
        "error": {
            "message": "not live",
            "type": "invalid_request_error",
            "param": None,
            "code": "attempt_not_live",
        }
    }
    assert post(FakeDoor(), shape="round")[0] == 400
    with pytest.raises(RuntimeError, match="a bug"):
        post(FakeDoor(RuntimeError("a bug")))


def events(body: bytes) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in body.decode().split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_streams() -> None:
    status, body, headers = post(FakeDoor(), stream=True)
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    found = events(body)
    assert found[-1] == "[DONE]"
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in found[:-1]) == "ok"


def test_a_stream_refused_at_once_has_its_status_and_later_an_event() -> None:
    error = Refusal(503, "gone", code="engine_error", kind="server_error")
    assert post(FakeDoor(error), stream=True)[0] == 503
    status, body, _ = post(FakeDoor(error, late=True), stream=True)
    assert status == 200
    assert events(body)[-1]["error"]["code"] == "engine_error"


def test_a_caller_who_leaves_cancels_the_call() -> None:
    door, leave = FakeDoor(), asyncio.Event()
    door.hold = asyncio.Event()
    leave.set()
    status, _, _ = call(door, "POST", URL, json.dumps(BODY).encode(), leave)
    assert status is None
    assert door.cancelled
