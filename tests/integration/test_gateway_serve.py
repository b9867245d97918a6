"""The gateway on a real Ray Serve behind HAProxy, with the real store actor, a scripted engine deployment and plain OpenAI clients."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from endpoint_fakes import Endpoint, chat, chat_events, endpoint
from gateway_fakes import TOOL
from gateway_system import System, run_config, start

from actors.gateway import start_serve
from agl_ray.types import AttemptedRollout, InputError

pytestmark = pytest.mark.slow


def outside(body: dict[str, Any]) -> Any:
    """The model outside: it says what it is asked to, streamed where asked, and fails on `fail`."""
    text = body["messages"][-1]["content"]
    if text == "fail":
        return 401, {}, {"error": {"message": "no such key"}}
    return chat_events(*text) if body.get("stream") else chat(text)


@pytest.fixture(scope="module")
def far() -> Iterator[Endpoint]:
    with endpoint(outside) as server:
        yield server


@pytest.fixture(scope="module")
def system(scratch: Path, far: Endpoint) -> Iterator[System]:
    """One system for the module; when it has stopped, nothing listens any more."""
    judge = {"kind": "endpoint", "base_url": f"{far.url}/v1", "model": "far"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGL_TEST_FAR_KEY", "sk-far")
        roles = {"planner": "train", "critic": "frozen"}
        keyed = {**judge, "api_key_env": "AGL_TEST_FAR_KEY"}
        running = start(scratch / "g", {**roles, "judge": keyed})
    yield running
    running.stop()
    port = int(running.url.rpartition(":")[2])
    others = [
        int(running.environment[f"RAY_SERVE_HAPROXY_{name}_PORT"]) for name in ("METRICS", "STATS")
    ]
    for left in (port, *others):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", left)) != 0


def say(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def test_three_roles(system: System, far: Endpoint) -> None:
    one = system.attempt()
    models = {"planner": "tiny", "critic": "tiny", "judge": "far"}
    for role, model in models.items():
        client = system.client(one, role)
        assert [entry.id for entry in client.models.list()] == [model]
        answer = client.chat.completions.create(model=model, messages=[say("say ok")])
        assert answer.choices[0].message.content == ("say ok" if role == "judge" else "ok")
        stream = client.chat.completions.create(model=model, messages=[say("say yes")], stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        assert text == ("say yes" if role == "judge" else "yes")
    assert far.requests[0][1]["authorization"] == "Bearer sk-far"
    with pytest.raises(openai.NotFoundError, match="expected one of critic, judge, planner"):
        system.client(one, "nobody").chat.completions.create(model="tiny", messages=[say("say x")])
    with pytest.raises(openai.InternalServerError, match=r"role judge .* HTTP 401: no such key"):
        system.client(one, "judge").chat.completions.create(model="far", messages=[say("fail")])
    spans = system.spans(one)
    calls = [span for span in spans if span["kind"] == "call"]
    kinds = {span["role"]: span["attributes"].get("agl.role_kind") for span in calls}
    assert kinds == {"planner": None, "critic": "frozen", "judge": "endpoint"}
    versions = {span["role"]: span["weight_versions"] for span in calls}
    assert versions == {"planner": [(0, 3)], "critic": [(0, 0)], "judge": None}
    assert {bool(span["response_ids"]) for span in calls if span["role"] == "judge"} == {False}
    state = system.state(one)
    counts = (state["calls"], state["outside_calls"], state["engine_errors"])
    assert counts == (6, 2, 1)


def test_a_conversation_with_a_tool(system: System) -> None:
    one = system.attempt()
    client = system.client(one)
    messages: list[Any] = [{"role": "system", "content": "You calculate."}, say("call 47+385")]
    first = client.chat.completions.create(model="tiny", messages=messages, tools=[TOOL])
    call = first.choices[0].message.tool_calls[0]
    assert first.choices[0].finish_reason == "tool_calls"
    assert json.loads(call.function.arguments) == {"expression": "47+385"}
    messages += [
        first.choices[0].message,
        {"role": "tool", "tool_call_id": call.id, "content": "432"},
    ]
    messages.append(say("say The answer is 432."))
    second = client.chat.completions.create(
        model="tiny",
        messages=messages,
        tools=[TOOL],
        logprobs=True,
        extra_body={"return_token_ids": True},
    )
    assert second.choices[0].message.content == "The answer is 432."
    assert second.usage.prompt_tokens == len(second.prompt_token_ids)
    tokens = second.choices[0].logprobs.content
    assert [token.logprob for token in tokens] == [-0.25] * len(second.choices[0].token_ids)
    spans = system.spans(one)
    assert [span["kind"] for span in spans] == ["call", "call"]
    assert spans[1]["parent_call"] == spans[0]["span_id"]
    assert spans[1]["parent_tokens"] == len(spans[0]["prompt_ids"]) + len(spans[0]["response_ids"])
    whole = [*spans[0]["prompt_ids"], *spans[0]["response_ids"], *spans[1]["prompt_ids"]]
    assert second.prompt_token_ids == whole
    assert spans[1]["weight_versions"] == [(0, 3)]
    state = system.state(one)
    assert (state["calls"], state["engine_errors"], state["retokenized_tokens"]) == (2, 0, 0)
    assert client.models.list().data[0].id == "tiny"


def test_streams(system: System) -> None:
    one = system.attempt()
    client = system.client(one)
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=[say("say caf\u00e9 \U0001f600!")],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "caf\u00e9 \U0001f600!"
    assert chunks[-1].usage.completion_tokens == system.spans(one)[0]["response_tokens"]
    assert len(chunks) > 4
    with client.chat.completions.stream(
        model="tiny", messages=[say("call 1+1")], tools=[TOOL]
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].finish_reason == "tool_calls"
    echo = final.choices[0].message.model_dump(exclude_none=True)
    echo["tool_calls"] = [
        {key: call[key] for key in ("id", "type", "function")} for call in echo["tool_calls"]
    ]
    for call in echo["tool_calls"]:
        call["function"] = {key: call["function"][key] for key in ("name", "arguments")}
    echo = {key: echo[key] for key in ("role", "tool_calls")}
    client.chat.completions.create(
        model="tiny", messages=[say("call 1+1"), echo, say("say ok")], tools=[TOOL]
    )
    assert system.state(one)["retokenized_tokens"] == 0


def test_many_at_once(system: System) -> None:
    """Concurrent attempts do not mix; the async client; more calls than the engine's default queue."""
    attempts = [system.attempt() for _ in range(40)]

    async def converse(one: AttemptedRollout, number: int) -> str:
        async with openai.AsyncOpenAI(
            base_url=system.base(one), api_key="x", max_retries=0
        ) as client:
            messages: list[Any] = [say(f"say {number}")]
            for _ in range(3):
                answer = await client.chat.completions.create(model="tiny", messages=messages)
                messages += [answer.choices[0].message, say(f"say {number}")]
            return str(messages[-2].content)

    async def everybody() -> list[str]:
        return await asyncio.gather(*(converse(one, n) for n, one in enumerate(attempts)))

    assert asyncio.run(everybody()) == [str(number) for number in range(40)]
    states = [system.state(one) for one in attempts]
    assert {
        (state["calls"], state["retokenized_tokens"], state["branches"]) for state in states
    } == {(3, 0, 0)}


def test_errors_reach_the_client_as_its_own(system: System) -> None:
    one = system.attempt()
    client = system.client(one)
    with pytest.raises(openai.BadRequestError, match="top_p") as bad:
        client.chat.completions.create(model="tiny", messages=[say("say x")], top_p=0.5)
    assert bad.value.param == "top_p"
    with pytest.raises(openai.BadRequestError, match="frobnicate"):
        client.chat.completions.create(
            model="tiny", messages=[say("say x")], extra_body={"frobnicate": 1}
        )
    with pytest.raises(openai.BadRequestError, match="maximum context length") as long:
        client.chat.completions.create(model="tiny", messages=[say("say " + "x" * 500)])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="tiny"):
        client.chat.completions.create(model="other", messages=[say("say x")])
    with pytest.raises(openai.InternalServerError, match="scripted failure") as failed:
        client.chat.completions.create(model="tiny", messages=[say("fail")])
    assert failed.value.status_code == 503
    with pytest.raises(openai.APIError, match="scripted failure"):
        list(client.chat.completions.create(model="tiny", messages=[say("fail")], stream=True))
    state = system.state(one)
    assert (state["calls"], state["engine_errors"]) == (0, 2)


def test_attempts_that_are_not_live_are_refused(system: System) -> None:
    one = system.attempt()
    unknown = openai.OpenAI(
        base_url=f"{system.url}/rollout/ro-x/attempt/at-x/v1", api_key="x", max_retries=0
    )
    with pytest.raises(openai.NotFoundError):
        unknown.chat.completions.create(model="tiny", messages=[say("say x")])
    system.ask("end", one.rollout_id, one.attempt_id)
    with pytest.raises(openai.APIStatusError) as gone:
        system.client(one).chat.completions.create(model="tiny", messages=[say("say x")])
    assert gone.value.status_code == 410


def test_validation_may_sample_as_it_likes(system: System) -> None:
    client = system.client(system.attempt("val"))
    answer = client.chat.completions.create(
        model="tiny", messages=[say("say ok")], temperature=0.0, top_p=0.5
    )
    assert answer.choices[0].message.content == "ok"


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_who_leaves_aborts_the_engine(system: System, stream: bool) -> None:
    """At the gateway's own door: it hears of every caller who leaves."""
    one = system.attempt()
    started, aborted = system.marks / "started", system.marks / "aborted"
    for mark in (started, aborted):
        mark.unlink(missing_ok=True)
    caller = slow_call(system, one, stream, system.ask("gateway_port"))
    asyncio.run(exists(started))
    caller.close()
    asyncio.run(exists(aborted))
    # The engine hears of it before the gateway has counted it.
    state = eventually(system, [one], "disconnects")[0]
    assert (state["calls"], state["disconnects"], state["open_calls"]) == (0, 1, 0), state


def test_haproxy_tells_of_callers_who_leave(system: System) -> None:
    """Of most: HAProxy 2.8 now and then does not read the end of a caller's connection, above all on a busy machine, and holds it until
    the answer is there or the call's deadline ends it."""
    attempts = [system.attempt() for _ in range(8)]
    callers = [slow_call(system, one, n % 2 == 0) for n, one in enumerate(attempts)]
    eventually(system, attempts, "open_calls")
    for caller in callers:
        caller.close()
    states = eventually(system, attempts, "disconnects", least=3)
    left = [state for state in states if state["disconnects"]]
    assert {(state["calls"], state["open_calls"]) for state in left} == {(0, 0)}


def slow_call(
    system: System, one: AttemptedRollout, stream: bool, port: int | None = None
) -> http.client.HTTPConnection:
    """A call of the scripted engine's `slow`. By a bare socket: a client library may keep the connection of a cancelled call."""
    address = urlsplit(system.base(one))
    caller = http.client.HTTPConnection(str(address.hostname), port or address.port, timeout=60)
    body = {"model": "tiny", "messages": [say("slow")], "stream": stream}
    headers = {"Content-Type": "application/json", "Authorization": "Bearer x"}
    caller.request("POST", f"{address.path}/chat/completions", json.dumps(body), headers)
    return caller


def eventually(
    system: System, attempts: list[AttemptedRollout], count: str, least: int | None = None
) -> list[dict[str, Any]]:
    """The attempts' states, as soon as this count is there in so many of them (all); the gateway has nothing to be waited for."""
    deadline = time.monotonic() + 30
    while True:
        states = [system.state(one) for one in attempts]
        if sum(state[count] > 0 for state in states) >= (least or len(attempts)):
            return states
        assert time.monotonic() < deadline, states
        time.sleep(0.1)


async def exists(mark: Path) -> None:
    """Wait, for less than the scripted engine takes to answer, until the file is there."""
    for _ in range(400):
        if await asyncio.to_thread(mark.exists):
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"no {mark.name} mark")


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"gateway\.port.*127\.0\.0\.1:{port}"):
            start_serve(run_config(tmp_path, port=port))
    with pytest.raises(InputError, match=r"gateway\.host"):
        start_serve(run_config(tmp_path, host="203.0.113.9"))
