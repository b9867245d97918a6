"""Roles answered by a model outside: passed on in its API's form, paced, tried again; a failure is never an answer."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from endpoint_fakes import Endpoint, chat, chat_events, endpoint, message
from gateway_desk import Desk
from gateway_fakes import TOOL, save_model_folder

from agl_ray.gateway import upstream
from agl_ray.gateway.caller import CallPath
from agl_ray.gateway.canonical import CallRequest
from agl_ray.gateway.render import Renderer
from agl_ray.gateway.roles import OutsideRole
from agl_ray.gateway.upstream import Upstream, UpstreamSettings
from agl_ray.gateway.upstream_anthropic import AnthropicApi
from agl_ray.gateway.upstream_openai import OpenAIApi
from agl_ray.types import WaitTimeout

CHAT, MESSAGES = "role/judge/v1/chat/completions", "role/judge/v1/messages"
ASKED = {"model": "far", "messages": [{"role": "user", "content": "good?"}]}
CALL = {"id": "t1", "type": "function", "function": {"name": "calculator", "arguments": '{"a":1}'}}
HISTORY = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "t1", "content": "2"},
]


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(save_model_folder(tmp_path_factory.mktemp("model")), "hermes")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(upstream, "FIRST_PAUSE", 0.01)
    return


def desk(renderer: Renderer, server: Endpoint, api: Any = None, **options: Any) -> Desk:
    fields = {
        name: options.pop(name) for name in ("key", "concurrency", "max_tokens") & options.keys()
    }
    per_minute = options.pop("requests_per_minute", None)
    base = server.url if isinstance(api, AnthropicApi) else f"{server.url}/v1"
    settings = UpstreamSettings(
        role="judge", base_url=base, model="far", requests_per_minute=per_minute, **fields
    )
    # One event loop per request here: a client may not outlive its loop.
    role = OutsideRole(_Fresh(settings, api or OpenAIApi()))
    return Desk(renderer, [], roles={"judge": role}, **options)


class _Fresh(Upstream):
    """Closes its connections behind every call."""

    async def whole(self, request: Any, deadline: float) -> Any:
        try:
            return await super().whole(request, deadline)
        finally:
            await self.close()

    async def stream(self, request: Any, deadline: float) -> Any:
        try:
            async for piece in super().stream(request, deadline):
                yield piece
        finally:
            await self.close()


def test_a_call_is_passed_on_and_recorded_without_ids(renderer: Renderer) -> None:
    with endpoint(chat("yes")) as server:
        one = desk(renderer, server, key="sk-1")
        tools = {"tools": [TOOL], "tool_choice": "none", "temperature": 0.0, "top_p": 0.5}
        found = one.post(CHAT, {**ASKED, "messages": HISTORY, "max_tokens": 9, **tools}).json()
    assert found["choices"][0]["message"]["content"] == "yes"
    assert (found["usage"]["prompt_tokens"], found["usage"]["completion_tokens"]) == (11, 3)
    path, headers, body = server.requests[0]
    assert (path, headers["authorization"]) == ("/v1/chat/completions", "Bearer sk-1")
    assert body["messages"][2]["tool_calls"] == [CALL]
    assert (body["model"], body["max_tokens"], body["temperature"], body["top_p"]) == (
        "far",
        9,
        0,
        0.5,
    )
    assert (body["tool_choice"], body["tools"]) == ("none", [TOOL])
    (row,) = one.rows
    assert (row["kind"], row["role"], row["prompt_ids"], row["response_ids"]) == (
        "call",
        "judge",
        None,
        None,
    )
    assert (row["prompt_tokens"], row["response_tokens"], row["model"]) == (11, 3, "far")
    noted = row["attributes"]
    assert noted["agl.role_kind"] == "endpoint"
    assert "no token ids" in noted["agl.token_ids"]
    assert noted["agl.endpoint"] == {
        "url": f"{server.url}/v1",
        "model": "far",
        "answered": "gpt-far-0",
    }
    assert "sk-1" not in json.dumps(row)


def test_an_answer_streams_token_by_token(renderer: Renderer) -> None:
    reached, events = threading.Event(), chat_events("o", "k", "!")
    events.insert(
        2, lambda: reached.wait(60)
    )  # the third piece waits until the first two have been read
    with endpoint(events) as server:
        one = desk(renderer, server)

        async def read() -> list[str]:

            request = CallRequest(model="far", messages=ASKED["messages"], stream=True)
            seen = []
            async for piece in one.door.call_stream(CallPath("ro-1", "at-1", "judge"), request):
                seen.append(getattr(piece, "text", piece.__class__.__name__))
                if seen[-1] == "k":
                    reached.set()
            return seen

        assert asyncio.run(read()) == ["", "o", "k", "!", "CallResult"]
        assert server.bodies[0]["stream_options"] == {"include_usage": True}
        found = one.events(CHAT, {**ASKED, "stream_options": {"include_usage": True}})
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in found[:-2]) == "ok!"
    assert found[-2]["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls_of_either_api(renderer: Renderer, stream: bool) -> None:
    parts = [{**CALL, "index": 0, "function": {"name": "calculator", "arguments": '{"a"'}}]
    rest = [{"index": 0, "function": {"arguments": ":1}"}}]
    chunks = [{"choices": [{"delta": {"tool_calls": part}}]} for part in (parts, rest)]
    chunks.append({"choices": [{"delta": {}, "finish_reason": "tool_calls"}]})
    use = {"type": "tool_use", "id": "t1", "name": "calculator", "input": {"a": 1}}
    blocks = [
        {"type": "message_start", "message": {"model": "m", "usage": {"input_tokens": 4}}},
        {"type": "content_block_start", "index": 0, "content_block": {**use, "input": {}}},
        {"type": "ping"},
        *(
            {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": part}}
            for part in ('{"a"', ":1}")
        ),
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 6}},
        {"type": "message_stop"},
    ]  # fmt: skip
    said = chunks if stream else chat(None, "tool_calls", tool_calls=[CALL])
    for api, script in (
        (OpenAIApi(), said),
        (AnthropicApi(), blocks if stream else message(use, stop="tool_use")),
    ):
        with endpoint(script) as server:
            one = desk(renderer, server, api)
            asked = {**ASKED, "tools": [TOOL]}
            if stream:
                events = [e for e in one.events(CHAT, asked) if e != "[DONE]"]
                found = next(
                    e["choices"][0]["delta"]["tool_calls"]
                    for e in events
                    if "tool_calls" in e["choices"][0]["delta"]
                )
            else:
                found = one.post(CHAT, asked).json()["choices"][0]["message"]["tool_calls"]
        assert found[0]["function"] == CALL["function"]
        assert one.rows[0]["attributes"]["response"]["tool_calls"][0]["id"] == "t1"


def test_anthropics_api_gets_its_own_form(renderer: Renderer) -> None:
    answer = message({"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "two"})
    with endpoint(answer) as server:
        one = desk(renderer, server, AnthropicApi(), key="k", max_tokens=50)
        tools = {"tools": [TOOL], "stop": ["x"]}
        found = one.post(CHAT, {**ASKED, "messages": HISTORY, **tools}).json()
    assert found["choices"][0]["message"]["content"] == "two"
    assert found["choices"][0]["message"]["reasoning"] == "hm"
    assert (found["usage"]["prompt_tokens"], found["usage"]["completion_tokens"]) == (9, 5)
    path, headers, body = server.requests[0]
    assert (path, headers["x-api-key"], headers["anthropic-version"]) == (
        "/v1/messages",
        "k",
        "2023-06-01",
    )
    assert (body["system"], body["max_tokens"], body["stop_sequences"]) == ("be brief", 50, ["x"])
    assert [m["role"] for m in body["messages"]] == ["user", "assistant", "user"]
    assert body["messages"][1]["content"] == [
        {"type": "tool_use", "id": "t1", "name": "calculator", "input": {"a": 1}}
    ]
    assert body["messages"][2]["content"][0]["tool_use_id"] == "t1"
    assert body["tools"] == [{"name": "calculator", "input_schema": {"type": "object"}}]
    refused = desk(renderer, server, AnthropicApi()).post(CHAT, {**ASKED, "seed": 1})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "seed")


BAD = {
    "no choices": {"choices": []},
    "no text": chat(None),
    "filtered": chat("so", "content_filter"),
    "not JSON": (200, {}, b"<html>"),
    "other form": {"choices": [{"message": {"content": ["?"]}, "finish_reason": "stop"}]},
    "wrong key": (401, {}, {"error": {"message": "bad key sk-secret"}}),
    "down": (500, {}, b"oops"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_failure_is_engine_error(renderer: Renderer, kind: str) -> None:
    with endpoint(BAD[kind]) as server:
        one = desk(renderer, server, key="sk-secret", call_timeout_seconds=0.4)
        found = one.post(CHAT, ASKED)
        state = asyncio.run(one.door.state(_path()))
    error = found.json()["error"]
    assert (found.status_code, error["code"]) == (503, "engine_error")
    assert "role judge" in error["message"]
    assert "sk-secret" not in error["message"]
    assert (state["calls"], state["engine_errors"]) == (0, 1)
    assert [row["name"] for row in one.rows] == ["model.call.failed"]
    assert one.store.notes  # the attempt ends engine_error if its agent goes on without the answer


def _path() -> Any:

    return CallPath("ro-1", "at-1")


def test_a_broken_stream_is_an_error_and_one_that_never_began_is_tried_again(
    renderer: Renderer,
) -> None:
    whole = chat_events("o", "k")
    with endpoint([whole[0], None], [None], whole) as server:
        one = desk(renderer, server)
        broken = one.events(CHAT, ASKED)
        assert broken[-1]["error"]["code"] == "engine_error"
        again = one.events(CHAT, ASKED)
    assert again[-1] == "[DONE]"
    assert len(server.requests) == 3
    assert [row["name"] for row in one.rows] == ["model.call.failed", "model.call"]


def test_a_busy_endpoint_is_asked_again_as_it_says_and_a_refusal_is_the_callers(
    renderer: Renderer,
) -> None:
    busy = (429, {"retry-after": "0.2"}, {"error": {"message": "slow down"}})
    with endpoint(busy, chat("yes"), (400, {}, {"error": {"message": "too long"}})) as server:
        one = desk(renderer, server)
        assert one.post(CHAT, ASKED).status_code == 200
        refused = one.post(CHAT, ASKED)
    assert server.times[1] - server.times[0] >= 0.2
    assert refused.status_code == 400
    assert "too long" in refused.json()["error"]["message"]
    assert len(one.rows) == 1  # it was the caller's mistake: no engine error


def ask_many(server: Endpoint, number: int, **limits: Any) -> float:
    """Seconds of so many calls at once."""

    async def run() -> float:
        settings = UpstreamSettings(role="judge", base_url=server.url, model="far", **limits)
        client, loop = Upstream(settings, OpenAIApi()), asyncio.get_running_loop()
        request = CallRequest(model="far", messages=ASKED["messages"])
        started = loop.time()
        try:
            await asyncio.gather(*(client.whole(request, started + 9) for _ in range(number)))
        finally:
            await client.close()
        return loop.time() - started

    return asyncio.run(run())


def test_so_many_at_once_and_so_many_a_minute() -> None:
    with endpoint(lambda body: threading.Event().wait(0.1) or chat("yes")) as server:
        ask_many(server, 6, concurrency=2)
        assert (len(server.requests), server.most_open) == (6, 2)
    with endpoint(chat("yes")) as server:
        assert ask_many(server, 6, requests_per_minute=1200) >= 0.25  # one in 50 ms


def test_a_turn_that_comes_too_late_is_named() -> None:
    with endpoint(chat("yes")) as server:

        async def run() -> None:
            settings = UpstreamSettings(
                role="judge", base_url=server.url, model="far", requests_per_minute=1
            )
            client, loop = Upstream(settings, OpenAIApi()), asyncio.get_running_loop()
            request = CallRequest(model="far", messages=ASKED["messages"])
            try:
                await client.whole(request, loop.time() + 9)
                with pytest.raises(WaitTimeout, match="a turn of the 1 a minute of the endpoint"):
                    await client.whole(request, loop.time() + 0.05)
            finally:
                await client.close()

        asyncio.run(run())
        assert len(server.requests) == 1


def test_a_caller_that_leaves_closes_the_connection(renderer: Renderer) -> None:
    asked, left = threading.Event(), threading.Event()

    def answer(body: Any) -> Any:
        asked.set()
        left.wait(60)
        return chat("late")

    with endpoint(answer) as server:
        one = desk(renderer, server)

        async def leave() -> None:

            request = CallRequest(model="far", messages=ASKED["messages"])
            task = asyncio.create_task(one.door.call(CallPath("ro-1", "at-1", "judge"), request))
            assert await asyncio.to_thread(asked.wait, 60)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(leave())
        left.set()
        assert asyncio.run(one.door.state(_path()))["disconnects"] == 1
    assert one.rows == []


@pytest.mark.parametrize("field", ["logprobs", "return_token_ids", "top_k_of_none"])
def test_what_ids_alone_could_answer_is_refused(renderer: Renderer, field: str) -> None:
    with endpoint(chat("yes")) as server:
        found = desk(renderer, server).post(CHAT, {**ASKED, field: True})
    assert (found.status_code, server.requests) == (400, [])


def test_other_dialects_are_answered_too(renderer: Renderer, tmp_path: Path) -> None:
    with endpoint(chat("yes")) as server:
        one = desk(renderer, server)
        asked = {"model": "far", "max_tokens": 5, "messages": ASKED["messages"]}
        answer = one.post(MESSAGES, asked).json()
        assert (answer["content"][0]["text"], answer["usage"]["output_tokens"]) == ("yes", 3)
        first = one.post("role/judge/v1/responses", {"model": "far", "input": "good?"}).json()
        second = {"model": "far", "input": "sure?", "previous_response_id": first["id"]}
        one.restart()
        assert one.post("role/judge/v1/responses", second).status_code == 200
    said = [m["content"] for m in server.bodies[-1]["messages"]]
    assert said == ["good?", "yes", "sure?"]
    counted = one.post(f"{MESSAGES}/count_tokens", {k: asked[k] for k in ("model", "messages")})
    assert counted.status_code == 400
