"""A model as a judge: what it is shown, how its answers are read, what is tried again; over a real HTTP server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from agl_ray.config.judge import JudgeConfig
from agl_ray.judge import Bench, Case, JudgedCall, JudgeFailed, Verdict
from agl_ray.judge.endpoint import AskingModel, filled
from agl_ray.types import ConfigError

CALL = JudgedCall(
    "c1",
    None,
    [{"role": "user", "content": "2+2? {answer} {high}"}],
    {"role": "assistant", "content": "four", "tool_calls": [{"id": "t"}]},
)
CASE = Case(task={"question": "2+2"}, mode=None, reward=None, calls=[CALL])


def ask(
    answers: list[Any], *, retries: int = 3, **options: Any
) -> tuple[Verdict | JudgeFailed, list[Any]]:
    """What a judge makes of `answers` (texts, or statuses), and the requests that came."""
    seen: list[Any] = []

    async def complete(request: web.Request) -> web.Response:
        body = await request.json()
        seen.append({"body": body, "key": request.headers.get("authorization")})
        answer = answers[min(len(seen), len(answers)) - 1]
        if isinstance(answer, int):
            return web.Response(status=answer, text="no", headers={"retry-after": "0"})
        return web.json_response({"choices": [{"message": {"content": answer}}]})

    async def main() -> Verdict | JudgeFailed:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", complete)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1/"
        asking = AskingModel(JudgeConfig(model="m", base_url=url, **options))
        bench = Bench(
            asking,
            retries=retries,
            timeout_seconds=20,
            concurrency=1,
            cache_size=0,
            first_pause=0.001,
        )
        try:
            return await bench.verdict(CASE)
        except JudgeFailed as error:
            return error
        finally:
            await asking.close()
            await runner.cleanup()

    return asyncio.run(main()), seen


def test_a_score_becomes_a_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    verdict, (request,) = ask(
        ['Here: ```json\n{"reason": "right", "score": 7.5}\n```'], api_key_env="JUDGE_KEY"
    )
    assert verdict == Verdict(reward=0.75, comment="right")
    assert request["key"] == "Bearer secret"
    body = request["body"]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.0, 512)
    assert body["response_format"]["type"] == "json_schema"
    (message,) = body["messages"]
    assert '{"question": "2+2"}' in message["content"]
    assert "[user]\n2+2? {answer} {high}" in message["content"]  # the agent's own braces stay
    assert '[assistant]\nfour\n[{"id": "t"}]' in message["content"]
    assert "a number from 0 (useless) to 10 (perfect)" in message["content"]


def test_instructions_and_scale_are_the_users() -> None:
    verdict, (request,) = ask(
        ['{"score": 1}'], instructions="Is it {answer}? {low}..{high}", scale=(-1.0, 3.0)
    )
    assert verdict == Verdict(reward=0.5)
    assert request["body"]["messages"][0]["content"] == 'Is it four\n[{"id": "t"}]? -1..3'


@pytest.mark.parametrize(
    "passing", [500, 429, "no idea", '{"score": 11}', '{"score": "9"}', '{"score": true}', "{"]
)
def test_what_may_pass_is_tried_again(passing: Any) -> None:
    verdict, requests = ask([passing, '{"score": 10}'])
    assert verdict == Verdict(reward=1.0)
    assert len(requests) == 2
    failed, requests = ask([passing], retries=1)
    assert isinstance(failed, JudgeFailed)
    assert "failed 2 times" in str(failed)
    assert len(requests) == 2


@pytest.mark.parametrize("status", [400, 401, 404])
def test_what_will_not_pass_is_not(status: int) -> None:
    failed, requests = ask([status])
    assert isinstance(failed, JudgeFailed)
    assert f"status {status}" in str(failed)
    assert len(requests) == 1


def test_nobody_there() -> None:
    config = JudgeConfig(model="m", base_url="http://127.0.0.1:9/v1")

    async def main() -> None:
        asking = AskingModel(config)
        bench = Bench(
            asking,
            retries=0,
            timeout_seconds=20,
            concurrency=1,
            cache_size=0,
        )
        with pytest.raises(JudgeFailed, match="ClientConnectorError"):
            await bench.verdict(CASE)
        await asking.close()

    asyncio.run(main())


def test_places_are_filled_in_one_pass() -> None:
    assert filled("{a}-{b}-{a}-{c}", {"{a}": "{b}", "{b}": "{a}"}) == "{b}-{a}-{b}-{c}"


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ({"function": "f.py:f", "model": "m"}, "not both"),
        ({"function": "f.py:f", "scale": (1.0, 2.0)}, "judge.scale acts together with judge.model"),
        ({"retries": 1}, "judge.retries needs"),
        ({"model": "m"}, "judge.base_url"),
        ({"model": "m", "base_url": "http://h", "scale": (2.0, 2.0)}, "lowest, highest"),
        ({"model": "m", "base_url": "http://h", "instructions": "{task}"}, "nothing of the work"),
    ],
)
def test_a_section_that_cannot_be_is_refused(section: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        JudgeConfig(**section)


def test_a_key_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    assert not JudgeConfig().on
    with pytest.raises(ConfigError, match="JUDGE_KEY"):
        AskingModel(JudgeConfig(model="m", base_url="http://h", api_key_env="JUDGE_KEY"))
    json.dumps(JudgeConfig().model_dump())
