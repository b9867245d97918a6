"""The chat dialect: every field acts or is refused by name; answers in OpenAI's form, whole and in pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agl_ray.gateway.canonical import CallResult, Refusal, Streamed, ToolCall
from agl_ray.gateway.dialects import chat, chat_answer

TOOL = {"type": "function", "function": {"name": "calculator", "parameters": {}, "strict": True}}


def body(**fields: Any) -> bytes:
    return json.dumps(
        {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    ).encode()


def refused(raw: bytes) -> dict[str, Any]:
    with pytest.raises(Refusal) as caught:
        chat.parse(raw)
    assert caught.value.status == 400
    error = json.loads(caught.value.body())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error


def result(**fields: Any) -> CallResult:
    base: dict[str, Any] = {
        "call_id": "c1",
        "created": 5,
        "content": "ok",
        "tool_calls": [],
        "finish_reason": "stop",
        "prompt_ids": [1, 2],
        "response_ids": [3, 4],
        "logprobs": [-0.1, -0.2],
        "weight_versions": [(0, 3)],
    }
    return CallResult(**{**base, **fields})


def test_what_is_given_is_taken_and_nothing_more() -> None:
    request = chat.parse(
        body(
            temperature=0.5,
            max_completion_tokens=7,
            stop="x",
            seed=3,
            stream=True,
            stream_options={"include_usage": True},
            logprobs=True,
            return_token_ids=True,
            user="u",
            metadata={"k": "v"},
            tools=[TOOL],
            n=1,
            parallel_tool_calls=True,
            response_format={"type": "text"},
            top_p=None,
            store=False,
        )
    )
    assert request.sampling == {"temperature": 0.5, "max_tokens": 7, "stop": ["x"], "seed": 3}
    assert request.stream
    assert request.include_usage
    assert request.logprobs
    assert request.return_token_ids
    assert request.parse_tools
    assert request.tools == [TOOL]
    assert request.metadata == {"k": "v", "user": "u"}
    assert chat.parse(body()).sampling == {}


def test_messages_become_the_templates_form() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    broken = {"id": "d", "type": "function", "function": {"name": "f", "arguments": "{oops"}}
    given = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        },
        {"role": "user", "content": "hi", "name": "bob"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [call, broken],
            "refusal": None,
            "annotations": [],
        },
        {"role": "tool", "tool_call_id": "c", "content": "1"},
    ]
    made = chat.parse(body(messages=given)).messages
    assert made[0] == {"role": "system", "content": "a\nb"}
    assert made[1] == {"role": "user", "content": "hi", "name": "bob"}
    assert [one["function"]["arguments"] for one in made[2]["tool_calls"]] == [{"a": 1}, "{oops"]
    assert made[2]["content"] == ""
    assert made[3] == {"role": "tool", "content": "1", "tool_call_id": "c"}


def test_tool_choice_none_renders_the_tools_but_finds_no_calls() -> None:
    request = chat.parse(body(tools=[TOOL], tool_choice="none"))
    assert request.tools == [TOOL]
    assert not request.parse_tools


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"frobnicate": 1}, "frobnicate"),
        ({"n": 0}, "n"),
        ({"n": 65}, "n"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes", "tools": [TOOL]}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"store": True}, "store"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "mood": "bad"}]}, "messages[0].mood"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "refusal": "no"}]},
            "messages[0].refusal",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    error = refused(body(**fields))
    assert error["param"] == param
    assert param.rpartition(".")[2].partition("[")[0] in error["message"]


def test_a_body_that_is_no_json_is_refused() -> None:
    assert "not valid JSON" in refused(b"{")["message"]
    assert refused(b'{"model": "m"}')["message"]


def test_the_body_of_an_answer() -> None:
    request = chat.parse(body(return_token_ids=True, logprobs=True))
    made = json.loads(chat_answer.response_body(request, [result()], [["o", "k"]]))
    assert made["choices"][0]["message"] == {"role": "assistant", "content": "ok"}
    assert made["choices"][0]["finish_reason"] == "stop"
    assert made["usage"]["total_tokens"] == 4
    assert made["prompt_token_ids"] == [1, 2]
    assert made["choices"][0]["token_ids"] == [3, 4]
    assert made["choices"][0]["weight_versions"] == [[0, 3]]
    assert [one["logprob"] for one in made["choices"][0]["logprobs"]["content"]] == [-0.1, -0.2]


def test_tool_calls_of_an_answer() -> None:
    calls = [ToolCall(id="call_1", name="f", arguments="{}")]
    made = json.loads(
        chat_answer.response_body(
            chat.parse(body()), [result(content=None, tool_calls=calls)], [None]
        )
    )
    choice = made["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert "token_ids" not in choice
    cut = result(content=None, tool_calls=calls, finish_reason="length")
    assert chat_answer.finish_reason(cut) == "length"


def test_the_events_of_a_stream_add_up() -> None:
    request = chat.parse(
        body(
            stream=True,
            stream_options={"include_usage": True},
            logprobs=True,
            return_token_ids=True,
        )
    )
    writer = chat_answer.ChunkWriter(request, Streamed(call_id="c1", created=5, prompt_ids=[1, 2]))
    events = [
        *writer.begin(),
        *writer.piece(Streamed(text="o", token_ids=[3], tokens=[("o", -0.1)])),
        *writer.piece(Streamed(token_ids=[4], tokens=[("k", -0.2)])),
        *writer.piece(Streamed(text="k")),
        *writer.end(result(tool_calls=[ToolCall(id="call_1", name="f", arguments="{}")])),
    ]
    assert events[-1] == b"data: [DONE]\n\n"
    parsed = [json.loads(event.removeprefix(b"data: ")) for event in events[:-1]]
    deltas = [chunk["choices"][0]["delta"] for chunk in parsed if chunk["choices"]]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content", "") for delta in deltas) == "ok"
    assert deltas[2]["tool_calls"][0]["id"] == "call_1"
    ids = [
        token for chunk in parsed if chunk["choices"] for token in chunk["choices"][0]["token_ids"]
    ]
    assert ids == [3, 4]
    assert parsed[-1]["usage"]["completion_tokens"] == 2
    assert parsed[-2]["choices"][0]["finish_reason"] == "tool_calls"
