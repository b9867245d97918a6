"""Several answers to one prompt: as many calls and spans, one body or one stream; one failure ends them all. And one tool call at most."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Any

import openai
import pytest
from asgi_serving import serving
from gateway_desk import BASE, Desk, calls, says
from gateway_fakes import save_model_folder

from agl_ray.gateway.engine_api import GenerateRequest
from agl_ray.gateway.render import Renderer
from agl_ray.types import EngineError

TURNS = [{"role": "user", "content": "1+1?"}]
CHAT, COMPLETIONS = "v1/chat/completions", "v1/completions"
SCHEMA = {"type": "object", "properties": {"expression": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "calculator", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(save_model_folder(tmp_path_factory.mktemp("model")), "hermes")


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": TURNS, **fields}


def test_every_answer_is_a_call_of_its_own(renderer: Renderer) -> None:
    desk = Desk(renderer, [says(renderer, text) for text in ("two", "Two.", "2")], mode="train")
    answer = desk.post(CHAT, chat(n=3, seed=5, logprobs=True, return_token_ids=True)).json()
    choices = answer["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert [choice["message"]["content"] for choice in choices] == ["two", "Two.", "2"]
    rows = {row["span_id"]: row for row in desk.rows}
    assert {choice["call_id"] for choice in choices} == set(rows)
    assert answer["id"] == f"chatcmpl-{choices[0]['call_id']}"
    for choice in choices:
        row = rows[choice["call_id"]]
        assert row["response_ids"] == choice["token_ids"]
        assert row["prompt_tokens"] == len(answer["prompt_token_ids"])
        assert len(choice["logprobs"]["content"]) == row["response_tokens"]
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(answer["prompt_token_ids"])
    assert usage["completion_tokens"] == sum(row["response_tokens"] for row in rows.values())
    assert [request.seed for request in desk.engine.requests] == [5, 6, 7]


def test_whichever_is_taken_the_conversation_goes_on_with_its_ids(renderer: Renderer) -> None:
    script = [says(renderer, text) for text in ("two", "Two.", "ok")]
    desk = Desk(renderer, script, mode="train")
    taken = desk.post(CHAT, chat(n=2)).json()["choices"][1]
    more = [*TURNS, taken["message"], {"role": "user", "content": "Sure?"}]
    desk.post(CHAT, chat(messages=more))
    last = desk.rows[-1]
    assert last["parent_call"] == taken["call_id"]
    assert last["attributes"]["agl.retokenized_tokens"] == 0


def test_a_seed_of_the_run_differs_between_answers(renderer: Renderer) -> None:
    desk = Desk(
        renderer,
        [says(renderer, text) for text in ("a", "b", "c")],
        metadata={"sampling": {"seed": 10}},
    )
    desk.post(CHAT, chat(n=3))
    assert [request.seed for request in desk.engine.requests] == [10, 11, 12]


@pytest.mark.parametrize("action", [CHAT, COMPLETIONS])
def test_streams_side_by_side(renderer: Renderer, action: str) -> None:
    texts = ["one two", "three", "four five six"]
    desk = Desk(renderer, [says(renderer, text) for text in texts])
    body = chat() if action == CHAT else {"model": "tiny", "prompt": "1+1?"}
    options = {"n": 3, "return_token_ids": True, "stream_options": {"include_usage": True}}
    events = desk.events(action, {**body, **options})
    assert events[-1] == "[DONE]"
    assert events.count("[DONE]") == 1
    said: dict[int, str] = defaultdict(str)
    ids: dict[str, list[int]] = defaultdict(list)
    ends = []
    for event in events[:-1]:
        for choice in event["choices"]:
            delta = choice["text"] if action == COMPLETIONS else choice["delta"].get("content")
            said[choice["index"]] += delta or ""
            ids[choice["call_id"]] += choice["token_ids"]
            ends += [choice["index"]] if choice["finish_reason"] else []
    assert sorted(said.values()) == sorted(texts)
    assert sorted(ends) == [0, 1, 2]
    assert ids == {row["span_id"]: row["response_ids"] for row in desk.rows}
    total = sum(row["response_tokens"] for row in desk.rows)
    assert events[-2]["usage"]["completion_tokens"] == total


def test_completions_whole(renderer: Renderer) -> None:
    desk = Desk(renderer, [says(renderer, text) for text in ("a", "b")])
    body = {"model": "tiny", "prompt": "1+1?", "n": 2, "best_of": 2, "logprobs": 1}
    choices = desk.post(COMPLETIONS, body).json()["choices"]
    assert [(choice["index"], choice["text"]) for choice in choices] == [(0, "a"), (1, "b")]
    assert all(choice["logprobs"]["token_logprobs"] for choice in choices)


@pytest.mark.parametrize("stream", [False, True])
def test_one_failure_ends_all(renderer: Renderer, stream: bool) -> None:
    """The others are aborted in the engine, and the caller gets one error."""
    desk = Desk(renderer, [])
    hold = asyncio.Event()
    asked: list[GenerateRequest] = []

    async def generate(request: GenerateRequest) -> Any:
        asked.append(request)
        if len(asked) == 3:
            raise EngineError("out of memory")
        try:
            await hold.wait()
        except asyncio.CancelledError:
            desk.engine.aborted.append(request.request_id)
            raise

    async def generate_stream(request: GenerateRequest) -> Any:
        await generate(request)
        yield

    desk.engine.generate = generate  # type: ignore[method-assign]
    desk.engine.generate_stream = generate_stream  # type: ignore[method-assign]
    answer = desk.post(CHAT, chat(n=3, stream=stream))
    assert answer.status_code == 503
    assert "out of memory" in answer.json()["error"]["message"]
    assert len(desk.engine.aborted) == 2
    assert desk.door.attempts._live["ro-1", "at-1"].open_calls == 0


def test_openais_client_reads_several(renderer: Renderer) -> None:
    texts = ["one", "two", "three", "four"]
    desk = Desk(renderer, [says(renderer, text) for text in texts])

    async def main() -> None:
        async with (
            serving(desk.app) as url,
            openai.AsyncOpenAI(base_url=f"{url}{BASE}/v1", api_key="k", max_retries=0) as client,
        ):
            turns: Any = TURNS
            whole = await client.chat.completions.create(model="tiny", messages=turns, n=2)
            assert [choice.message.content for choice in whole.choices] == texts[:2]
            async with client.chat.completions.stream(model="tiny", messages=turns, n=2) as stream:
                final = await stream.get_final_completion()
            assert sorted(choice.message.content or "" for choice in final.choices) == [
                "four",
                "three",
            ]

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("action", "fields"),
    [
        (CHAT, {"messages": TURNS, "tools": [TOOL], "parallel_tool_calls": False}),
        (
            "v1/responses",
            {
                "input": "1+1?",
                "tools": [{"type": "function", **TOOL["function"]}],  # type: ignore[dict-item]
                "parallel_tool_calls": False,
            },
        ),
        (
            "v1/messages",
            {
                "messages": TURNS,
                "max_tokens": 90,
                "tools": [{"name": "calculator", "input_schema": SCHEMA}],
                "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
            },
        ),
    ],
)
def test_one_tool_call_at_most(
    renderer: Renderer, action: str, fields: dict[str, Any], stream: bool
) -> None:
    """The second call is not shown; the ids that were sampled are recorded all the same."""
    entry = says(renderer, f"{calls('1+1')}\n{calls('2+2')}")
    desk = Desk(renderer, [entry])
    answer = desk.post(action, {"model": "tiny", "stream": stream, **fields})
    assert answer.status_code == 200, answer.text
    assert "1+1" in answer.text
    assert "2+2" not in answer.text
    (row,) = desk.rows
    assert row["response_ids"] == entry.response_ids
    assert len(row["attributes"]["response"]["tool_calls"]) == 1


def test_both_tool_calls_where_nothing_forbids_it(renderer: Renderer) -> None:
    desk = Desk(renderer, [says(renderer, f"{calls('1+1')}\n{calls('2+2')}")])
    made = desk.post(CHAT, chat(tools=[TOOL])).json()["choices"][0]["message"]["tool_calls"]
    assert len(made) == 2
