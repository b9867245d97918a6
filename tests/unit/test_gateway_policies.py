"""What one attempt may ask for, and what training refuses: in every dialect's words, recorded, counted."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import pytest
from gateway_desk import Desk, says
from gateway_fakes import save_model_folder

from agl_ray.gateway.caller import CallPath
from agl_ray.gateway.canonical import SAMPLING_KEYS, CallRequest, Refusal
from agl_ray.gateway.limits import Limits
from agl_ray.gateway.render import Renderer
from agl_ray.gateway.roles import OutsideRole
from agl_ray.gateway.upstream import Outside, Piece, Upstream, UpstreamSettings
from agl_ray.gateway.upstream_openai import OpenAIApi
from agl_ray.types import EngineError

CHAT = "v1/chat/completions"
ASKED = {"model": "tiny", "messages": [{"role": "user", "content": "1+1?"}]}


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(save_model_folder(tmp_path_factory.mktemp("model")), "hermes")


def desk(renderer: Renderer, limits: Limits, **options: Any) -> Desk:
    return Desk(renderer, lambda request: says(renderer, "yes"), limits=limits, **options)


def state(one: Desk) -> dict[str, Any]:
    return asyncio.run(one.door.state(CallPath("ro-1", "at-1")))


def test_calls_beyond_the_cap_are_refused_in_the_dialects_words(renderer: Renderer) -> None:
    one = desk(renderer, Limits(calls=2))
    for role in ("", "role/planner/"):
        assert one.post(f"{role}{CHAT}", ASKED).status_code == 200
    found = one.post(CHAT, ASKED)
    assert (found.status_code, found.headers["x-should-retry"]) == (429, "false")
    error = found.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rollout_calls_used_up")
    assert "gateway.max_calls (2)" in error["message"]
    found = one.post("v1/messages", {**ASKED, "max_tokens": 5})
    assert (found.status_code, found.json()["error"]["type"]) == (429, "rate_limit_error")
    assert one.post(CHAT, {**ASKED, "stream": True}).status_code == 429
    assert (state(one)["calls"], state(one)["refused_calls"]) == (2, 3)
    assert [row["name"] for row in one.rows] == ["model.call", "model.call", "model.call.refused"]
    assert one.store.notes == []  # no engine error: the attempt may still end ok
    one.restart()
    assert one.post(CHAT, ASKED).status_code == 429


def test_calls_at_once_do_not_pass_the_cap_together(renderer: Renderer) -> None:
    async def run() -> list[int]:
        import json

        import httpx

        one = desk(renderer, Limits(calls=3))
        transport = httpx.ASGITransport(one.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://desk") as client:
            url = f"/rollout/ro-1/attempt/at-1/{CHAT}"
            answers = await asyncio.gather(
                *(client.post(url, content=json.dumps(ASKED)) for _ in range(8))
            )
        return sorted(answer.status_code for answer in answers)

    assert asyncio.run(run()) == [200] * 3 + [429] * 5


def test_a_failed_call_is_given_back(renderer: Renderer) -> None:
    script = [EngineError("broken"), says(renderer, "yes"), says(renderer, "yes")]
    one = Desk(renderer, script, limits=Limits(calls=1))
    assert [one.post(CHAT, ASKED).status_code for _ in range(3)] == [503, 200, 429]


def test_tokens_are_cut_to_what_is_left(renderer: Renderer) -> None:
    size = len(says(renderer, "yes").response_ids)
    one = desk(renderer, Limits(tokens=2 * size + 1))
    for left in (2 * size + 1, size + 1, 1):
        assert one.post(CHAT, ASKED).status_code == 200
        assert one.engine.requests[-1].max_tokens == min(40, left)
    found = one.post(CHAT, ASKED)
    assert found.json()["error"]["code"] == "rollout_tokens_used_up"
    assert "gateway.max_tokens_per_rollout" in found.json()["error"]["message"]
    assert state(one)["response_tokens"] == 3 * size
    one.restart()
    assert one.post(CHAT, ASKED).status_code == 429


HARMFUL: dict[str, Any] = {
    "temperature": 0,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": 1},
    "response_format": {"type": "json_object"},
}
HARMLESS = {
    "max_tokens",
    "stop",
    "seed",
}  # they choose where an answer ends, or the noise, not the distribution


def test_no_sampling_parameter_is_without_a_rule() -> None:
    assert set(SAMPLING_KEYS) == (HARMFUL.keys() - {"logit_bias", "response_format"}) | HARMLESS


@pytest.mark.parametrize("name", HARMFUL)
def test_what_bends_the_distribution_is_refused_in_training(renderer: Renderer, name: str) -> None:
    one = desk(renderer, Limits(), mode="train")
    found = one.post(CHAT, {**ASKED, name: HARMFUL[name]})
    assert found.status_code == 400
    assert name in found.json()["error"]["message"] + str(found.json()["error"]["param"])
    assert one.engine.requests == []


@pytest.mark.parametrize("role", [None, "judge"])
def test_a_streamed_call_counts_once_while_its_last_pieces_are_sent(
    renderer: Renderer, role: str | None
) -> None:
    far = OutsideRole(_Far())
    one = desk(renderer, Limits(calls=2), roles={"judge": far})
    path, asked = CallPath("ro-1", "at-1", role), request("far" if role else "tiny")

    async def run() -> Any:
        parallel = []
        async with aclosing(one.door.call_stream(path, asked)) as stream:
            async for _ in stream:
                live = await one.door.attempts.open(path)
                live.open_calls -= 1
                assert live.counts["calls"] + live.underway == 1 + len(parallel)
                if live.counts["calls"] and not parallel:
                    parallel.append(await one.door.call(path, asked))
        return live, parallel

    live, parallel = asyncio.run(run())
    assert [answer.content for answer in parallel] == ["yes"]
    assert (live.counts["calls"], live.counts["refused_calls"], live.underway) == (2, 0, 0)


@pytest.mark.parametrize("role", [None, "judge"])
def test_a_stream_that_fails_or_is_left_is_underway_no_more(
    renderer: Renderer, role: str | None
) -> None:
    one = Desk(
        renderer,
        [says(renderer, "yes"), EngineError("broken"), says(renderer, "yes")],
        limits=Limits(calls=1),
        roles={"judge": OutsideRole(_Far("left", "broken", "yes"))},
    )
    path, asked = CallPath("ro-1", "at-1", role), request("far" if role else "tiny")

    async def run() -> Any:
        async with aclosing(one.door.call_stream(path, asked)) as stream:
            await anext(stream)
            assert (await anext(stream)).text  # it is left in the middle
        with pytest.raises(Refusal, match="broken"):
            async for _ in one.door.call_stream(path, asked):
                pass
        async for _ in one.door.call_stream(path, asked):
            pass
        with pytest.raises(Refusal, match="used up"):
            await one.door.call(path, asked)
        return await one.door.attempts.open(path)

    live = asyncio.run(run())
    assert (live.counts["calls"], live.underway) == (1, 0)


def request(model: str) -> CallRequest:
    return CallRequest(model=model, messages=ASKED["messages"])


class _Far(Upstream):
    """A model outside that says these words, one for each call."""

    def __init__(self, *script: str) -> None:
        settings = UpstreamSettings(role="judge", base_url="http://far", model="far")
        super().__init__(settings, OpenAIApi())
        self.script = iter(script)

    async def whole(self, request: CallRequest, deadline: float) -> Outside:
        word = next(self.script, "yes")
        if word == "broken":
            raise EngineError("broken")
        return Outside(content=word, finish_reason="stop")

    async def stream(self, request: CallRequest, deadline: float) -> Any:
        answer = await self.whole(request, deadline)
        yield Piece(text=answer.content or "")
        yield answer
