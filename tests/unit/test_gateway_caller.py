"""Model calls are children of the agent's OpenTelemetry spans: by the header of its instrumented client, or by our own."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import httpx2
import pytest
from gateway_desk import Desk, says
from gateway_fakes import save_model_folder
from opentelemetry import propagate, trace

import agl_ray as agl
from agl_ray.agents import dev
from agl_ray.gateway.caller import Caller, caller_of
from agl_ray.gateway.render import Renderer
from agl_ray.tracing import SpanRecorder, follow, recording
from agl_ray.types import EngineError

CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "1+1?"}],
    "max_tokens": 30,
}
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(save_model_folder(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (PARENT, Caller("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")),
        (PARENT.replace("b7ad6b7169203331", "0" * 16), None),
        ("00-xyz-1-01", None),
        ("\u00ff" * 55, None),
        ("", None),
    ],
)
def test_only_what_trace_context_knows_is_a_parent(value: str, found: Caller | None) -> None:
    assert caller_of([(b"traceparent", value.encode("latin-1"))]) == found


def test_without_the_header_a_call_has_no_parent(renderer: Renderer) -> None:
    desk = Desk(renderer, [says(renderer, "2")])
    desk.post("v1/chat/completions", CHAT)
    assert [(row["trace_id"], row["parent_id"]) for row in desk.rows] == [(None, None)]


@pytest.mark.parametrize("stream", [False, True])
def test_calls_answered_failed_and_refused_are_children_of_the_agents_span(
    renderer: Renderer, stream: bool
) -> None:
    """The header as OpenTelemetry's instrumented clients make it, from a span of its SDK."""
    follow()
    script = [says(renderer, "2"), EngineError("out of memory")]
    desk = Desk(renderer, script, max_model_len=60)
    recorder = SpanRecorder("ro-1", "at-1")
    headers: dict[str, str] = {}
    with recording(recorder), trace.get_tracer("agent").start_as_current_span("think") as span:
        propagate.inject(headers)
    expected = {(f"{span.get_span_context().trace_id:032x}", recorder.rows()[0]["span_id"])}
    for content in ("1+1?", "1+1?", "1+1?" * 50):
        messages = [{"role": "user", "content": content}]
        desk.post(
            "v1/chat/completions", {**CHAT, "stream": stream, "messages": messages}, **headers
        )
    assert len(desk.rows) == 3
    assert {(row["trace_id"], row["parent_id"]) for row in desk.rows} == expected


def test_an_operations_calls_say_so_themselves(renderer: Renderer) -> None:
    """Without an instrumented client: ours tells the gateway, of the attempt's own calls only."""
    follow()
    desk = Desk(renderer, [says(renderer, "2"), says(renderer, "2")])
    recorder = SpanRecorder("ro-1", "at-1")
    with recording(recorder):
        desk.post("v1/chat/completions", CHAT)
        with agl.operation(name="plan") as plan:
            desk.post("v1/chat/completions", CHAT)
    outside, inside = desk.rows
    assert outside["parent_id"] is None
    assert (inside["parent_id"], inside["trace_id"]) == (plan.span().span_id, plan.span().trace_id)


@pytest.mark.parametrize("library", [httpx, httpx2])
def test_nobody_else_is_told(library: Any) -> None:
    follow()
    heard: list[str | None] = []
    transport = library.MockTransport(
        lambda request: heard.append(request.headers.get("traceparent")) or library.Response(200)
    )
    with (
        library.Client(transport=transport) as client,
        recording(SpanRecorder("ro-1", "at-1")),
        agl.operation(name="plan") as plan,
    ):
        client.get("http://elsewhere/v1/models")
        client.get("http://gateway/rollout/ro-1/attempt/at-1/v1/models")
        client.get("http://gateway/rollout/ro-2/attempt/at-1/v1/models")
        own = {"traceparent": PARENT}
        client.get("http://gateway/rollout/ro-1/attempt/at-1/v1/models", headers=own)
    span = plan.span()
    assert heard == [None, f"00-{span.trace_id}-{span.span_id}-01", None, PARENT]


class _Server(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        body = b'{"model": "m", "usage": {"prompt_tokens": 3, "completion_tokens": 1}}'
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


def test_dev_nests_calls_under_the_operation_that_made_them() -> None:
    @agl.rollout
    def agent(task: str, llm: agl.LLM) -> float:
        with agl.operation(name="long"), agl.operation(name="plan"):
            httpx.post(f"{llm.endpoint}/v1/chat/completions", json={})
        httpx.post(f"{llm.endpoint}/v1/chat/completions", json={})
        return 1.0

    server = HTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        (tried,) = dev.develop(agent, ["row"], base_url=url, model="m")
    finally:
        server.shutdown()
        server.server_close()
    names = {
        row["span_id"]: row["attributes"].get("agentlightning.operation.name")
        for row in tried.spans
        if row["kind"] == "span"
    }
    above = [names.get(row["parent_id"]) for row in tried.spans if row["kind"] == "call"]
    assert above == ["plan", None]
