"""Bad input, the same for every dialect: each answer has the dialect's own error body and its status, and the gateway goes on."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from asgi_serving import serving
from gateway_desk import BASE, Desk, calls, says
from gateway_fakes import save_model_folder

from agl_ray.gateway import http
from agl_ray.gateway.engine_api import GenerateChunk, GenerateRequest
from agl_ray.gateway.render import Renderer
from agl_ray.types import EndReason, replace

ASKED = [{"role": "user", "content": "1+1?"}]
BODIES: dict[str, dict[str, Any]] = {
    "v1/chat/completions": {"model": "tiny", "messages": ASKED, "max_tokens": 30},
    "v1/completions": {"model": "tiny", "prompt": "1+1?", "max_tokens": 30},
    "v1/responses": {"model": "tiny", "input": "1+1?", "max_output_tokens": 30},
    "v1/messages": {"model": "tiny", "messages": ASKED, "max_tokens": 30},
}
LIMIT = {"v1/responses": "max_output_tokens"}
PARAMETERS = {"type": "object", "properties": {"expression": {"type": "string"}}}
FUNCTION = {"name": "calculator", "parameters": PARAMETERS}
TOOLS: dict[str, dict[str, Any]] = {
    "v1/chat/completions": {"type": "function", "function": FUNCTION},
    "v1/responses": {"type": "function", **FUNCTION},
    "v1/messages": {"name": "calculator", "input_schema": PARAMETERS},
}

every = pytest.mark.parametrize("action", list(BODIES))


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(save_model_folder(tmp_path_factory.mktemp("model")), "hermes")


def message(action: str, answer: httpx.Response, status: int) -> str:
    """The text of an error that has the dialect's form."""
    assert answer.status_code == status, answer.text
    made = answer.json()
    if action == "v1/messages":
        assert set(made) == {"type", "error"}
        assert set(made["error"]) == {"type", "message"}
    else:
        assert set(made) == {"error"}
        assert set(made["error"]) == {"message", "type", "param", "code"}
    text: str = made["error"]["message"]
    return text


@every
@pytest.mark.parametrize(
    "raw", [b"", b"{", b"null", b"[]", b'"\xff"', b"{" * 50_000, b'{"model": "tiny"}', b"\x00"]
)
def test_bodies_that_are_none(renderer: Renderer, action: str, raw: bytes) -> None:
    desk = Desk(renderer, [])
    assert message(action, desk.post(action, raw), 400)
    assert desk.rows == []


@every
def test_an_oversized_body(
    renderer: Renderer, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "MAX_BODY", 1000)
    asked = {**BODIES[action], "metadata": {"user_id": "x" * 1000}}
    assert "at most 1000 bytes" in message(action, Desk(renderer, []).post(action, asked), 413)


@every
def test_a_wrong_key(renderer: Renderer, action: str) -> None:
    desk = Desk(renderer, [says(renderer, "2"), says(renderer, "2")])
    desk.app = http.GatewayApp(desk.door, renderer, api_key="the-key")
    wrong: list[dict[str, str]] = [
        {},
        {"Authorization": "Bearer other"},
        {"Authorization": "the-key"},
        {"Authorization": "Basic the-key"},
        {"Authorization": "Bearer the-key2", "x-api-key": "the-ke"},
        {"x-api-key": ""},
    ]
    for headers in wrong:
        answer = desk.post(action, BODIES[action], **headers)
        assert "api_key" in message(action, answer, 401)
        kind = answer.json()["error"]
        assert kind["type"] == "authentication_error" or kind["code"] == "invalid_api_key"
    other = f"../../../ro-2/attempt/at-1/{action}"
    assert message(action, desk.post(other, BODIES[action]), 401)
    for headers in ({"Authorization": "bearer the-key"}, {"x-api-key": "the-key"}):
        assert desk.post(action, BODIES[action], **headers).status_code == 200
    assert len(desk.rows) == 2


def test_whatever_tells_of_an_attempt_asks_for_the_key(renderer: Renderer) -> None:
    app = http.GatewayApp(Desk(renderer, []).door, renderer, api_key="the-key")

    async def statuses() -> list[int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://desk") as client:
            paths = (f"{BASE}/state", f"{BASE}/v1/models", "/healthz")
            bare = [(await client.get(path)).status_code for path in paths]
            client.headers["x-api-key"] = "the-key"
            return bare + [(await client.get(path)).status_code for path in paths]

    assert asyncio.run(statuses()) == [401, 401, 200, 200, 200, 200]


@every
def test_a_finished_attempt_and_one_that_never_was(renderer: Renderer, action: str) -> None:
    desk = Desk(renderer, [])
    ended = EndReason.TIMEOUT
    desk.store.attempt = replace(desk.store.attempt, status=ended.status, end_reason=ended)
    for stream in (False, True):
        answer = desk.post(action, {**BODIES[action], "stream": stream})
        assert "has ended" in message(action, answer, 410)
    other = f"../../../ro-2/attempt/at-1/{action}"
    assert "not known" in message(action, desk.post(other, BODIES[action]), 404)


@every
@pytest.mark.parametrize("limit", [0, -5, 1.5, "many"])
def test_impossible_limits(renderer: Renderer, action: str, limit: Any) -> None:
    asked = {**BODIES[action], LIMIT.get(action, "max_tokens"): limit}
    assert "max" in message(action, Desk(renderer, []).post(action, asked), 400)


@every
def test_a_limit_beyond_the_context_is_cut(renderer: Renderer, action: str) -> None:
    desk = Desk(renderer, [says(renderer, "2")], max_model_len=100)
    asked = {**BODIES[action], LIMIT.get(action, "max_tokens"): 10**30}
    desk.store.resources.resources["main_llm"].sampling_parameters.clear()
    assert desk.post(action, asked).status_code == 200
    (request,) = desk.engine.requests
    assert request.max_tokens == 100 - len(request.prompt_ids)


@every
@pytest.mark.parametrize(
    ("named", "text"),
    [
        (["main_llm"], "its LLM resources (main_llm, other), got ['main_llm']"),
        ("mian", "its LLM resources (main_llm, other), got 'mian'"),
        (None, "has 2 LLM resources; expected one, or metadata['resource'] to name one"),
    ],
)
def test_a_rollout_whose_model_is_not_said(
    renderer: Renderer, action: str, named: Any, text: str
) -> None:
    desk = Desk(renderer, [])
    resources = desk.store.resources.resources
    resources["other"] = resources["main_llm"]
    desk.store.rollout = replace(desk.store.rollout, metadata={"resource": named})
    assert text in message(action, desk.post(action, BODIES[action]), 404)


def test_numbers_that_the_engine_cannot_hold(renderer: Renderer) -> None:
    for key in ("seed", "top_k"):
        asked = {**BODIES["v1/completions"], key: 10**30}
        assert key in message("", Desk(renderer, []).post("v1/completions", asked), 400)


@every
def test_a_wrong_method(renderer: Renderer, action: str) -> None:
    async def get() -> httpx.Response:
        transport = httpx.ASGITransport(Desk(renderer, []).app)
        async with httpx.AsyncClient(transport=transport, base_url="http://desk") as client:
            return await client.get(f"{BASE}/{action}")

    assert "expected POST" in message(action, asyncio.run(get()), 405)


@pytest.mark.parametrize("action", list(TOOLS))
@pytest.mark.parametrize(
    "broken",
    [
        "<tool_call>\n{oops\n</tool_call>",
        '<tool_call>\n{"name": "calculator", "arguments": {"expression": "1+',
        '<tool_call>\n{"name": "calculator", "arguments": "1+1"}\n</tool_call>',
        '<tool_call>\n["calculator"]\n</tool_call>',
    ],
)
def test_a_broken_call_of_the_model_is_text_and_goes_on(
    renderer: Renderer, action: str, broken: str
) -> None:
    desk = Desk(renderer, [says(renderer, broken), says(renderer, broken), says(renderer, "ok")])
    asked = {**BODIES[action], "tools": [TOOLS[action]], LIMIT.get(action, "max_tokens"): 500}
    made = desk.post(action, asked)
    assert made.status_code == 200
    assert json.dumps(broken)[1:-1] in made.text
    assert desk.events(action, asked)
    back = {"role": "assistant", "content": broken}
    turns = [*ASKED, back, {"role": "user", "content": "What?"}]
    assert desk.post(action, {**asked, "input" if "input" in asked else "messages": turns})
    assert desk.rows[2]["attributes"]["agl.retokenized_tokens"] == 0


@every
def test_a_caller_who_leaves_in_mid_stream(renderer: Renderer, action: str) -> None:
    """Over a real server: the engine's work ends, nothing is recorded, and the next call is answered."""
    desk = Desk(renderer, [says(renderer, "2")])
    ids = renderer.encode("Well, well, well.")
    stopped = asyncio.Event()

    async def endless(request: GenerateRequest) -> Any:
        try:
            while True:
                for token in ids:
                    yield GenerateChunk(response_ids=[token], logprobs=[-0.5])
                    await asyncio.sleep(0.001)
        finally:
            stopped.set()

    desk.engine.generate_stream = endless  # type: ignore[method-assign]

    async def main() -> dict[str, Any]:
        async with serving(desk.app) as url, httpx.AsyncClient(base_url=url) as client:
            path = f"{BASE}/{action}"
            asked = {**BODIES[action], "stream": True}
            async with client.stream("POST", path, json=asked) as answer:
                async for _ in answer.aiter_bytes():
                    break
            await asyncio.wait_for(stopped.wait(), 10)
            assert (await client.post(path, json=BODIES[action])).status_code == 200
            state: dict[str, Any] = (await client.get(f"{BASE}/state")).json()
            return state

    state = asyncio.run(main())
    assert (state["calls"], state["disconnects"], state["open_calls"]) == (1, 1, 0)
    assert len(desk.rows) == 1


@pytest.mark.parametrize("action", list(TOOLS))
def test_tools_without_a_parser(tmp_path: Any, action: str) -> None:
    bare = Renderer(save_model_folder(tmp_path / "bare"))
    asked = {**BODIES[action], "tools": [TOOLS[action]]}
    assert "engine.tool_parser" in message(action, Desk(bare, []).post(action, asked), 400)


@pytest.mark.parametrize(
    "function", [{"name": "f", "parameters": 5}, {"name": "f", "description": [1]}]
)
def test_tools_that_no_parser_could_read(renderer: Renderer, function: dict[str, Any]) -> None:
    asked = {**BODIES["v1/chat/completions"], "tools": [{"type": "function", "function": function}]}
    desk = Desk(renderer, [])
    assert "tools" in message("", desk.post("v1/chat/completions", asked), 400)
    assert desk.engine.requests == []


@every
def test_half_a_character(renderer: Renderer, action: str) -> None:
    raw = json.dumps(BODIES[action]).replace("1+1?", "\\ud800").encode()
    assert message(action, Desk(renderer, []).post(action, raw), 400)


def test_roles_have_every_dialect(renderer: Renderer) -> None:
    desk = Desk(renderer, [says(renderer, calls("1")) for _ in BODIES])
    for action, asked in BODIES.items():
        assert desk.post(f"role/planner/{action}", asked).status_code == 200
    assert {row["role"] for row in desk.rows} == {"planner"}
    assert len({row["dialect"] for row in desk.rows}) == len(BODIES)
