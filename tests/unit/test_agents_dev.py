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

import pytest
from aiohttp import web

import agl_ray as agl
from agl_ray.agents.dev import develop
from agl_ray.cli.app import main
from agl_ray.tracing import operation
from agl_ray.types import EndReason, InputError

SEEN: list[Any] = []


@contextlib.contextmanager
def server() -> Iterator[str]:
    """A server in another thread; its base URL. It says how often it was asked."""
    loop = asyncio.new_event_loop()
    usage = {"prompt_tokens": 7, "completion_tokens": 3}

    async def chat(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        SEEN.append((body, request.headers.get("authorization")))
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
    assert main(["dev", "my_agent.py:solve", *words, "--mode", "test"]) == 2
    assert main(["dev", "no-such-program", "--command", *words]) == 2
    assert os.environ.get("OPENAI_BASE_URL") is None
