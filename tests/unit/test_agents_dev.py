"""`agl-ray dev` and `Trainer.dev`: an agent against a server that speaks OpenAI's language, in this process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web

import agl_ray as agl
from agl_ray.agents.dev import develop, servers_of
from agl_ray.agents.endpoint import Server
from agl_ray.cli.app import main
from agl_ray.config.roles import RoleConfig
from agl_ray.tracing import operation
from agl_ray.types import EndReason, InputError

SEEN: list[Any] = []
KEYS: list[list[str]] = []


@contextlib.contextmanager
def server() -> Iterator[str]:
    """A server in another thread; its base URL. It says how often it was asked."""
    loop = asyncio.new_event_loop()
    usage = {"prompt_tokens": 7, "completion_tokens": 3}

    async def chat(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        SEEN.append((body, request.headers.get("authorization")))
        KEYS.append(request.headers.getall("x-api-key", []))
        if body["model"] == "busy":
            return web.json_response({"error": {"message": "try later"}}, status=503)
        if not body.get("stream"):
            message = {"role": "assistant", "content": "42"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            return web.json_response(
                {
                    "id": "c",
                    "object": "chat.completion",
                    "created": 1,
                    "model": "m",
                    "choices": [choice],
                    "usage": usage,
                }
            )
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        for delta, finish, more in (("4", None, {}), ("2", "length", {"usage": usage})):
            choice = {"index": 0, "delta": {"content": delta}, "finish_reason": finish}
            event = {
                "id": "c",
                "object": "chat.completion.chunk",
                "created": 1,
                "model": "m",
                "choices": [choice],
                **more,
            }
            await answer.write(f"data: {json.dumps(event)}\n\n".encode())
        await answer.write(b"data: [DONE]\n\n")
        await asyncio.sleep(0.3)  # the agent has its answer and ends before the stream does
        return answer

    async def start() -> tuple[web.AppRunner, str]:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", chat)
        app.router.add_post("/v1/messages", chat)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner, f"http://127.0.0.1:{runner.addresses[0][1]}/v1"

    runner, url = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield url
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


@agl.rollout
def asks(task: dict[str, Any], llm: agl.LLM) -> float:
    """One call inside an operation, one streamed after it."""
    from openai import OpenAI

    assert threading.current_thread() is threading.main_thread()
    client = OpenAI(base_url=llm.endpoint, api_key=llm.api_key, max_retries=0)
    messages: Any = [{"role": "user", "content": task["q"]}]
    with operation(name="think"):
        said = client.chat.completions.create(model=llm.model, messages=messages)
    text = said.choices[0].message.content
    pieces = client.chat.completions.create(model=llm.model, messages=messages, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text == "42"
    return float(task["a"] == text)


def test_calls_go_through_and_are_in_the_tree(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"q": "6*7", "a": "42"}, {"q": "1+1", "a": "2"}]
    config = agl.RunConfig.model_validate({"model": {"path": "unused"}})
    SEEN.clear()
    with server() as url:
        tried = agl.Trainer(config).dev(asks, rows, base_url=url, model="m", api_key="secret")
    assert [one.outcome.reward for one in tried] == [1.0, 0.0]
    assert {key for _, key in SEEN} == {"Bearer secret"}
    calls = [row for row in tried[0].spans if row["kind"] == "call"]
    assert [(c["prompt_tokens"], c["response_tokens"], c["finish_reason"]) for c in calls] == [
        (7, 3, "stop"),
        (7, 3, "length"),
    ]
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if "think" in line or "chat/" in line]
    think, inner, outer = lines[:3]
    assert "think" in think
    assert inner.index("chat/completions") > think.index("think")  # a branch of its operation
    assert "7 + 3 tokens  length" in outer
    assert "2 rows: 2 ok, mean reward 0.500, 4 calls, 28 + 12 tokens" in shown


def test_a_server_that_fails_is_an_engine_error_and_the_next_row_goes_on() -> None:
    with server() as url:
        tried = develop(asks, [{"q": "a", "a": "b"}] * 2, base_url=url, model="busy")
    assert [one.outcome.reason for one in tried] == [EndReason.ENGINE_ERROR] * 2
    tried = develop(asks, [{"q": "a", "a": "b"}], base_url="http://127.0.0.1:9/v1", model="m")
    assert tried[0].outcome.reason is EndReason.ENGINE_ERROR
    assert [row["status"] for row in tried[0].spans if row["kind"] == "call"] == ["ERROR"]
    assert "nothing answers at http://127.0.0.1:9/v1" in str(tried[0].outcome.error)


def test_ctrl_c_in_the_agent_is_the_persons() -> None:
    def interrupted(task: Any) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        develop(agl.rollout(interrupted), [1], base_url="http://127.0.0.1:9/v1", model="m")


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(InputError, match="base_url"):
        develop(asks, [1], model="m")
    with pytest.raises(InputError, match="model"):
        develop(asks, [1], base_url="http://127.0.0.1:9/v1")


def test_the_verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"q": "6*7", "a": "42"}\n{"q": "?", "a": "!"}\n')
    (tmp_path / "my_agent.py").write_text(
        "def solve(task, llm, ctx):\n    print('mode', ctx.mode)\n    return 0.5\n\n"
        "def fails(task):\n    raise ValueError('not today')\n"
    )
    monkeypatch.chdir(tmp_path)
    words = ["--data", "rows.jsonl", "--model", "m", "--base-url", "http://127.0.0.1:9/v1"]
    assert main(["dev", "my_agent.py:solve", *words, "--rows", "1", "--mode", "val"]) == 0
    shown = capsys.readouterr().out
    assert "mode val" in shown
    assert "1 rows: 1 ok, mean reward 0.500" in shown
    assert main(["dev", "my_agent.py:fails", *words]) == 1
    assert "not today" in capsys.readouterr().out
    script = 'echo "{\\"reward\\": 0.25}"'
    assert main(["dev", f"sh -c '{script}'", "--command", *words]) == 0
    assert "2 rows: 2 ok, mean reward 0.250" in capsys.readouterr().out
    assert main(["dev", "my_agent.py:absent", *words]) == 2
    assert main(["dev", "my_agent.py:solve", *words, "--mode", "vall"]) == 2
    assert main(["dev", "no-such-program", "--command", *words]) == 2
    assert os.environ.get("OPENAI_BASE_URL") is None


def _ask(llm: agl.LLM, question: str) -> str:
    from openai import OpenAI

    client = OpenAI(base_url=llm.endpoint, api_key=llm.api_key, max_retries=0)
    messages: Any = [{"role": "user", "content": question}]
    said = client.chat.completions.create(model=llm.model, messages=messages)
    return said.choices[0].message.content or ""


@agl.rollout
def team(task: str, prompt_template: agl.PromptTemplate, ctx: agl.RolloutContext) -> float:
    """The README's roles, and a prompt template."""
    plan = _ask(ctx.llm("planner"), prompt_template.format(task=task))
    return float(_ask(ctx.llm("judge"), plan) == "42")


def test_roles_and_resources_are_there_and_a_role_outside_has_its_own_server_and_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAR_KEY", "far-secret")
    outside = {"kind": "endpoint", "model": "far", "api_key_env": "FAR_KEY"}
    template = agl.PromptTemplate(template="Plan: {task}")
    SEEN.clear()
    with server() as near, server() as far:
        roles = {"planner": "train", "judge": {**outside, "base_url": far}}
        config = agl.RunConfig.model_validate({"model": {"path": "unused"}, "roles": roles})
        tried = agl.Trainer(config).dev(
            team,
            ["6*7"],
            base_url=near,
            model="m",
            api_key="secret",
            resources={"ask": template},
            mode="val",
            timeout_seconds=60,
        )
    assert tried[0].outcome.reward == 1.0, tried[0].outcome.error
    asked = [(body["model"], body["messages"][0]["content"], key) for body, key in SEEN]
    assert asked == [("m", "Plan: 6*7", "Bearer secret"), ("far", "42", "Bearer far-secret")]
    calls = [row for row in tried[0].spans if row["kind"] == "call"]
    assert [row["role"] for row in calls] == ["planner", "judge"]


def test_an_anthropic_role_gets_its_key_and_not_the_other_servers() -> None:
    def agent(task: Any, ctx: agl.RolloutContext) -> float:
        llm = ctx.llm("critic")
        headers = {"X-Api-Key": str(llm.api_key), "Authorization": f"Bearer {llm.api_key}"}
        request = {"model": llm.model, "messages": []}
        return float(
            httpx.post(f"{llm.endpoint}/messages", json=request, headers=headers).is_success
        )

    SEEN.clear(), KEYS.clear()
    with server() as url:
        root = url.removesuffix("/v1")
        role = {"kind": "endpoint", "api": "anthropic", "base_url": root, "model": "c"}
        servers = servers_of({"critic": RoleConfig.model_validate(role)})
        assert servers["critic"] == Server(url, {"anthropic-version": "2023-06-01"})
        keyed = {"critic": Server(url, {"x-api-key": "theirs"})}
        for given in (servers, keyed):
            tried = develop(
                *(agl.rollout(agent), [1]),
                base_url="http://127.0.0.1:9/v1",
                model="m",
                api_key="mine",
                roles={"critic": "c"},
                servers=given,
            )
            assert tried[0].outcome.reward == 1.0, tried[0].outcome.error
    assert [(body["model"], key) for body, key in SEEN] == [("c", None)] * 2
    assert KEYS == [[], ["theirs"]]


def test_the_verb_takes_roles_and_prompt_templates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"q": "6*7"}\n')
    (tmp_path / "my_agent.py").write_text(
        "def solve(task, prompt_template, resources, ctx):\n"
        "    names = [ctx.llm('planner').model, ctx.llm('judge').model, *sorted(resources)]\n"
        "    print(prompt_template.format(**task), *names, ctx.mode)\n    return 1.0\n"
    )
    (tmp_path / "ask.txt").write_text("What is {q}?")
    monkeypatch.chdir(tmp_path)
    start = ["dev", "my_agent.py:solve", "--data", "rows.jsonl", "--model", "m"]
    start += ["--base-url", "http://127.0.0.1:9/v1"]
    roles = ["--role", "planner", "--role", "judge=big"]
    template = ["--prompt-template", "ask.txt"]
    assert main([*start, *roles, *template, "--mode", "test"]) == 0
    assert "What is 6*7? m big main_llm prompt_template test" in capsys.readouterr().out
    assert main([*start, *roles, "--prompt-template", "ask=ask.txt"]) == 0
    assert "m big ask main_llm train" in capsys.readouterr().out
    for wrong, text in [
        (["--role", "planner", "--role", "planner=b"], "given twice"),
        (["--role", "a b"], "no role's name"),
        (["--role", "judge="], "a model behind the ="),
        (["--prompt-template", "absent.txt"], "absent.txt"),
        (["--prompt-template", "main_llm=ask.txt"], "a name that is free"),
        ([*template, *template], "a name that is free"),
    ]:
        assert main([*start, *wrong]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert text in said


def test_a_mode_or_a_deadline_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(InputError, match="mode: expected one of train, val, test, got 'vall'"):
        develop(asks, [1], base_url="http://127.0.0.1:9/v1", model="m", mode="vall")
    with pytest.raises(InputError, match="timeout_seconds: expected a number above 0"):
        develop(asks, [1], base_url="http://127.0.0.1:9/v1", model="m", timeout_seconds=0)


def test_a_plain_function_may_run_a_loop_of_its_own_in_this_thread() -> None:
    threads = []

    @agl.rollout
    def agent(task: float) -> float:
        async def ends() -> float:
            await asyncio.wait_for(asyncio.sleep(0), 5)
            threads.append(threading.current_thread())
            return task

        return asyncio.run(ends())

    tried = develop(agent, [0.5, 1.0], base_url="http://127.0.0.1:9/v1", model="m")
    assert [one.outcome.reward for one in tried] == [0.5, 1.0]
    assert threads == [threading.main_thread()] * 2
