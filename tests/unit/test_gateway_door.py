"""The door: sessions, sampling rules, deadlines and retries, what is written before an answer is given, what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest
from gateway_fakes import TOOL, FakeEngine, FakeStore, save_model_folder

from agl_ray.gateway.caller import CallPath
from agl_ray.gateway.canonical import CallRequest, CallResult, Refusal, Streamed
from agl_ray.gateway.door import Door, DoorSettings
from agl_ray.gateway.engine_api import GenerateRequest, GenerateResult
from agl_ray.gateway.render import Renderer
from agl_ray.gateway.roles import EngineLost, EngineRole
from agl_ray.types import Attempt, EndReason, EngineError, WaitTimeout, replace

PATH = CallPath("ro-1", "at-1")


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(save_model_folder(tmp_path_factory.mktemp("model")), "hermes")


class Bench:
    """A door with its fakes."""

    def __init__(
        self, renderer: Renderer, script: Any, *, mode: str = "train", **options: Any
    ) -> None:
        self.store = FakeStore(mode, options.pop("metadata", None))
        self.engine = FakeEngine(script)
        self.time = 0.0
        settings = DoorSettings(**{"max_model_len": 400, "call_timeout_seconds": 5.0, **options})
        roles = {"planner": EngineRole(self.engine, renderer)}
        self.door = Door(
            self.store, self.engine, renderer, settings, now=lambda: self.time, roles=roles
        )

    @property
    def rows(self) -> list[dict[str, Any]]:
        return asyncio.run(self.store.query_span_rows("ro-1"))


def ask(text: str = "1+1?", **fields: Any) -> CallRequest:
    given = {"model": "tiny", "messages": [{"role": "user", "content": text}], **fields}
    return CallRequest(**given)


def words(renderer: Renderer, text: str, end: bool = True) -> tuple[list[int], str]:
    return (
        [*renderer.encode(text), *(renderer.stop_ids if end else [])],
        "stop" if end else "length",
    )


def refusal(work: Awaitable[Any]) -> Refusal:
    async def caught() -> Refusal:
        with pytest.raises(Refusal) as info:
            await work
        return info.value

    return asyncio.run(caught())


def test_a_call_is_journalled_before_it_is_answered(renderer: Renderer) -> None:
    bench = Bench(renderer, [words(renderer, "It is 2.")])
    result = asyncio.run(bench.door.call(PATH, ask()))
    assert result.content == "It is 2."
    assert result.weight_versions == [(0, 7)]
    (row,) = bench.rows
    assert row["kind"] == "call"
    assert row["prompt_ids"] == bench.engine.requests[0].prompt_ids
    assert row["response_ids"] == result.response_ids
    assert row["response_logprobs"] == [-0.5] * len(result.response_ids)
    assert row["attributes"]["request"]["sampling"] == {"max_tokens": 40}
    assert row["attributes"]["agl.retokenized_tokens"] == 0
    bench.store.refuse = WaitTimeout("the journal", 1.0)
    bench.engine.script = [words(renderer, "lost")]
    assert refusal(bench.door.call(PATH, ask())).status == 503


def test_a_conversation_is_stored_in_suffix_form_and_survives_a_restart(renderer: Renderer) -> None:
    bench = Bench(renderer, [words(renderer, "two"), words(renderer, "four")])
    messages = [{"role": "user", "content": "1+1?"}]

    async def turns(door: Door, count: int) -> None:
        for _ in range(count):
            result = await door.call(PATH, ask(messages=list(messages)))
            messages.extend([result.message(), {"role": "user", "content": "twice?"}])

    asyncio.run(turns(bench.door, 2))
    settings = DoorSettings(max_model_len=400)
    reborn = Door(bench.store, bench.engine, renderer, settings)
    bench.store.attempt = replace(bench.store.attempt, num_spans=2)
    bench.engine.script = [words(renderer, "eight")]
    asyncio.run(turns(reborn, 1))
    first, second, third = bench.rows
    assert second["parent_call"] == first["span_id"]
    assert third["parent_call"] == second["span_id"]
    assert second["parent_tokens"] == len(first["prompt_ids"]) + len(first["response_ids"])
    whole = [
        *first["prompt_ids"],
        *first["response_ids"],
        *second["prompt_ids"],
        *second["response_ids"],
    ]
    assert bench.engine.requests[2].prompt_ids == [*whole, *third["prompt_ids"]]
    assert [row["attributes"]["agl.retokenized_tokens"] for row in bench.rows] == [0, 0, 0]
    assert second["attributes"]["request"]["messages_from"] == 1
    state = asyncio.run(reborn.state(PATH))
    assert (state["calls"], state["retokenized_tokens"], state["branches"]) == (3, 0, 0)


def test_roles_have_sessions_of_their_own(renderer: Renderer) -> None:
    bench = Bench(renderer, lambda request: words(renderer, "yes"))
    for role in (None, "planner", "planner"):
        asyncio.run(bench.door.call(CallPath("ro-1", "at-1", role), ask()))
    parents = [row["parent_call"] for row in bench.rows]
    assert parents[:2] == [None, None]
    assert parents[2] == bench.rows[1]["span_id"]
    assert bench.rows[2]["attributes"]["agl.branch_reason"] == "sibling"
    assert bench.store.lookups == 1


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        (CallPath("ro-unknown", "at-1"), 404, "rollout_not_found"),
        (CallPath("ro-1", "at-other"), 409, "attempt_not_live"),
    ],
)
def test_wrong_paths(renderer: Renderer, path: CallPath, status: int, code: str) -> None:
    found = refusal(Bench(renderer, []).door.call(path, ask()))
    assert (found.status, found.code) == (status, code)


def test_an_attempt_that_ends_is_noticed(renderer: Renderer) -> None:
    bench = Bench(renderer, lambda request: words(renderer, "yes"))
    asyncio.run(bench.door.call(PATH, ask()))
    ended = EndReason.TIMEOUT
    bench.store.attempt = replace(bench.store.attempt, status=ended.status, end_reason=ended)
    bench.time = 10.0
    for _ in range(2):
        assert refusal(bench.door.call(PATH, ask())).status == 410
    assert len(bench.engine.requests) == 1
    assert asyncio.run(bench.door.state(PATH))["calls"] == 1


def test_idle_sessions_are_forgotten(renderer: Renderer) -> None:
    bench = Bench(renderer, lambda request: words(renderer, "yes"), idle_seconds=100.0)
    asyncio.run(bench.door.call(PATH, ask()))
    bench.time = 101.0
    asyncio.run(bench.door.call(PATH, ask()))
    assert bench.store.lookups == 2
    assert len(bench.door.attempts) == 1


def test_silent_attempts_that_are_over_are_forgotten(renderer: Renderer) -> None:
    """The store is asked after 10 s of silence, then after 20, ...; without an answer nothing is forgotten."""
    bench = Bench(renderer, lambda request: words(renderer, "yes"))
    asked: list[float] = []
    answer = bench.store.get_latest_attempt

    async def counted(rollout_id: str) -> Attempt | None:
        asked.append(bench.time)
        if bench.time == 25.0:
            raise WaitTimeout("the store", 1.0)
        return await answer(rollout_id)

    bench.store.get_latest_attempt = counted  # type: ignore[method-assign]

    async def at(time: float) -> int:
        """The attempts that are known once somebody else has called."""
        bench.time = time
        with pytest.raises(Refusal):
            await bench.door.call(CallPath("ro-2", "at-1"), ask())
        if bench.door.attempts._asking is not None:
            await bench.door.attempts._asking
        return len(bench.door.attempts)

    async def scenario() -> None:
        await bench.door.call(PATH, ask())
        ended = EndReason.OK
        assert [await at(time) for time in (5.0, 11.0, 18.0)] == [1, 1, 1]
        assert asked == [11.0]
        bench.store.attempt = replace(
            bench.store.attempt, status=ended.status, end_reason=ended, num_spans=1
        )
        assert [await at(time) for time in (25.0, 31.0)] == [1, 0]
        assert asked == [11.0, 25.0, 31.0]
        assert (await bench.door.state(PATH))["calls"] == 1

    asyncio.run(scenario())


def test_sampling_precedence(renderer: Renderer) -> None:
    bench = Bench(
        renderer,
        lambda request: words(renderer, "x"),
        mode="val",
        metadata={"sampling": {"temperature": 0.25, "max_tokens": 30}},
    )
    given: list[dict[str, Any]] = [
        {},
        {"temperature": 0.75, "max_tokens": 99},
        {"max_tokens": 5, "top_p": 0.5},
    ]
    for sampling in given:
        asyncio.run(bench.door.call(PATH, ask(sampling=sampling)))
    sent = [(r.temperature, r.max_tokens, r.top_p) for r in bench.engine.requests]
    assert sent == [(0.25, 30, 1.0), (0.75, 30, 1.0), (0.25, 5, 0.5)]
    asyncio.run(
        Bench(renderer, [words(renderer, "x")], mode="val").door.call(
            PATH, ask(sampling={"temperature": 0.0})
        )
    )


@pytest.mark.parametrize(
    ("sampling", "param"),
    [
        ({"top_p": 0.9}, "top_p"),
        ({"top_k": 5}, "top_k"),
        ({"min_p": 0.1}, "min_p"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [""]}, "stop"),
    ],
)
def test_training_refuses_what_breaks_its_logprobs(
    renderer: Renderer, sampling: dict[str, Any], param: str
) -> None:
    bench = Bench(renderer, [])
    found = refusal(bench.door.call(PATH, ask(sampling=sampling)))
    assert (found.status, found.param) == (400, param)
    assert param in found.message
    assert bench.engine.requests == []
    assert asyncio.run(bench.door.state(PATH))["open_calls"] == 0


def test_other_refusals_before_the_engine(renderer: Renderer, tmp_path: Path) -> None:
    long = refusal(Bench(renderer, [], max_model_len=20).door.call(PATH, ask("x" * 200)))
    assert (long.status, long.code) == (400, "context_length_exceeded")
    assert "maximum context length is 20 tokens" in long.message
    assert refusal(Bench(renderer, []).door.call(PATH, ask(model="gpt"))).code == "model_not_found"
    bare = Renderer(save_model_folder(tmp_path / "bare"))
    found = refusal(Bench(bare, []).door.call(PATH, ask(tools=[TOOL], parse_tools=True)))
    assert (found.status, found.param) == (400, "tools")


def test_the_answer_is_cut_to_the_room_that_is_left(renderer: Renderer) -> None:
    bench = Bench(renderer, [words(renderer, "x", end=False)], max_model_len=20)
    asyncio.run(bench.door.call(PATH, ask("hi")))
    (request,) = bench.engine.requests
    assert request.max_tokens == 20 - len(request.prompt_ids) < 40


def test_a_lost_engine_is_replaced_and_a_failing_one_is_reported(renderer: Renderer) -> None:
    bench = Bench(renderer, [EngineLost("replica died"), words(renderer, "yes")])
    assert asyncio.run(bench.door.call(PATH, ask())).content == "yes"
    first, second = bench.engine.requests
    assert first.request_id != second.request_id
    bench.engine.script = [EngineError("out of memory")]
    found = refusal(bench.door.call(PATH, ask()))
    assert (found.status, found.code) == (503, "engine_error")
    state = asyncio.run(bench.door.state(PATH))
    assert (state["calls"], state["engine_errors"]) == (1, 1)
    assert "out of memory" in state["last_engine_error"]
    assert [row["kind"] for row in bench.rows] == ["call", "span"]
    assert bench.rows[1]["status"] == "ERROR"


def test_the_deadline_ends_retries_and_waits(renderer: Renderer) -> None:
    def lost(request: GenerateRequest) -> Any:
        return EngineLost("replica died")

    for seconds in (1.2, 8.0):  # the second where the machine stood still
        bench = Bench(renderer, lost, call_timeout_seconds=seconds)
        assert refusal(bench.door.call(PATH, ask())).code == "engine_error"
        if (tries := len(bench.engine.requests)) >= 2:
            break
    assert 2 <= tries <= 2 * seconds + 1
    silent = Bench(renderer, [], call_timeout_seconds=0.1)

    async def never() -> Refusal:
        silent.engine.hold = asyncio.Event()
        with pytest.raises(Refusal, match="the engine's answer to call") as info:
            await silent.door.call(PATH, ask())
        return info.value

    assert asyncio.run(never()).status == 503
    assert silent.engine.aborted == [silent.engine.requests[0].request_id]


def test_a_caller_who_goes_away_aborts_the_engine(renderer: Renderer) -> None:
    bench = Bench(renderer, [])

    async def leave() -> None:
        bench.engine.hold = asyncio.Event()
        call = asyncio.create_task(bench.door.call(PATH, ask()))
        await bench.engine.asked.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(leave())
    assert len(bench.engine.aborted) == 1
    state = asyncio.run(bench.door.state(PATH))
    assert (state["calls"], state["disconnects"], state["open_calls"]) == (0, 1, 0)


async def streamed(door: Door, request: CallRequest) -> tuple[str, CallResult]:
    text, last = "", None
    async for piece in door.call_stream(PATH, request):
        if isinstance(piece, Streamed):
            text += piece.text
        else:
            last = piece
    assert last is not None
    return text, last


@pytest.mark.parametrize(
    ("text", "tools", "stop"),
    [
        ("The answer is 432.", False, None),
        (
            'Well.<tool_call>\n{"name": "calculator", "arguments": {"expression": "1+1"}}\n</tool_call>',
            True,
            None,
        ),
        ("Well.<tool_call>\n{oops\n</tool_call>", True, None),
        ("a < b <tool", True, None),
        ("Think. Observation: none", False, "Observation:"),
        ("caf\u00e9 \U0001f600", False, None),
    ],
)
def test_a_stream_gives_the_message_of_a_whole_answer(
    renderer: Renderer, text: str, tools: bool, stop: str | None
) -> None:
    ids, finish = words(renderer, text, end=stop is None)
    answer = GenerateResult(
        response_ids=ids,
        logprobs=[-0.5] * len(ids),
        weight_versions=[(0, 7)],
        finish_reason="stop" if stop else finish,  # type: ignore[arg-type]
        stop_reason=stop,
    )
    request = ask(
        tools=[TOOL] if tools else None,
        parse_tools=tools,
        sampling={"stop": [stop]} if stop else {},
    )
    whole = asyncio.run(Bench(renderer, [answer]).door.call(PATH, request))
    bench = Bench(renderer, [answer])
    shown, last = asyncio.run(streamed(bench.door, request))
    assert (last.content, [call.name for call in last.tool_calls]) == (
        whole.content,
        [call.name for call in whole.tool_calls],
    )
    assert (last.content or "") == shown
    if stop:
        assert last.content == "Think. "
    assert len(bench.rows) == 1
    messages = [*request.messages, last.message(), {"role": "user", "content": "go on"}]
    bench.engine.script = [words(renderer, "fine")]
    asyncio.run(
        bench.door.call(PATH, ask(messages=json.loads(json.dumps(messages)), tools=request.tools))
    )
    assert bench.rows[1]["attributes"]["agl.retokenized_tokens"] == 0
    assert bench.rows[1]["parent_tokens"] == len(bench.rows[0]["prompt_ids"]) + len(ids)


def test_a_stream_that_breaks_off_is_an_engine_error(renderer: Renderer) -> None:
    bench = Bench(renderer, [EngineError("gone")])

    async def read() -> None:
        async for _ in bench.door.call_stream(PATH, ask()):
            pass

    assert refusal(read()).status == 503
    bench = Bench(renderer, [EngineLost("gone"), words(renderer, "yes")])
    assert asyncio.run(streamed(bench.door, ask()))[1].content == "yes"


def test_an_answer_that_the_engine_aborted_is_no_answer(renderer: Renderer) -> None:
    bench = Bench(renderer, [(renderer.encode("ha"), "abort")])
    assert refusal(bench.door.call(PATH, ask())).code == "engine_error"
    assert [row["kind"] for row in bench.rows] == ["span"]


def test_a_call_beside_a_failed_one_does_not_make_it_answered(renderer: Renderer) -> None:
    """Only a call that was made after the failure shows that the agent went on from there."""
    bench = Bench(renderer, [])
    told: list[list[dict[str, Any]]] = []

    async def main() -> None:
        bench.engine.hold = asyncio.Event()
        bench.engine.script = [words(renderer, "yes")]
        slow = asyncio.ensure_future(bench.door.call(PATH, ask("beside")))
        await bench.engine.asked.wait()
        bench.engine.hold, held = None, bench.engine.hold
        bench.engine.script = [EngineError("out of memory")]
        with pytest.raises(Refusal, match="out of memory"):
            await bench.door.call(PATH, ask("failing"))
        bench.engine.script = [words(renderer, "yes"), words(renderer, "yes")]
        held.set()
        await slow
        told.append(list(bench.store.notes))
        await bench.door.call(PATH, ask("after it"))
        told.append(list(bench.store.notes))

    asyncio.run(main())
    assert [list(note) for note in told[0]] == [["unanswered_call"]]
    assert [list(note) for note in told[1]] == [["unanswered_call"], []]
