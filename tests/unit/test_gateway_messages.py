"""The Anthropic messages dialect: requests as Anthropic's programs send them, answers and events as its client reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gateway_desk import Desk, calls, says
from gateway_fakes import save_model_folder

from agl_ray.gateway.canonical import Refusal
from agl_ray.gateway.dialects import messages, messages_answer
from agl_ray.gateway.render import Renderer
from agl_ray.types import EngineError

ACTION = "v1/messages"
TOOL = {
    "name": "calculator",
    "description": "adds",
    "input_schema": {"type": "object", "properties": {"expression": {"type": "string"}}},
}


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(save_model_folder(tmp_path_factory.mktemp("model")), "hermes")


def body(**fields: Any) -> dict[str, Any]:
    asked = [{"role": "user", "content": "1+1?"}]
    return {"model": "tiny", "max_tokens": 60, "messages": asked, **fields}


def refused(**fields: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        messages.parse(json.dumps(body(**fields)).encode())
    assert caught.value.status == 400
    return caught.value


def test_an_answer_in_words(renderer: Renderer) -> None:
    desk = Desk(renderer, [says(renderer, "It is 2.")])
    answer = desk.post(ACTION, body(system="Be brief.", metadata={"user_id": "u"}))
    made = answer.json()
    assert answer.status_code == 200
    assert made["id"].startswith("msg_")
    assert made["content"] == [{"type": "text", "text": "It is 2."}]
    assert (made["type"], made["role"], made["model"]) == ("message", "assistant", "tiny")
    assert (made["stop_reason"], made["stop_sequence"]) == ("end_turn", None)
    asked = len(desk.engine.requests[0].prompt_ids)
    assert made["usage"] == {
        "input_tokens": asked - 4,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 4,
        "output_tokens": len(desk.rows[0]["response_ids"]),
    }
    assert desk.prompt().startswith("<|im_start|>system\nBe brief.<|im_end|>")
    (row,) = desk.rows
    assert row["dialect"] == "anthropic.messages"
    assert row["attributes"]["request"]["metadata"] == {"user_id": "u"}


@pytest.mark.parametrize(
    ("entry", "reason", "sequence"),
    [
        ({"text": "a\n\nHuman:", "stop": "\n\nHuman:"}, "stop_sequence", "\n\nHuman:"),
        ({"text": "cut", "end": False}, "max_tokens", None),
    ],
)
def test_stop_reasons(
    renderer: Renderer, entry: dict[str, Any], reason: str, sequence: str | None
) -> None:
    desk = Desk(renderer, [says(renderer, **entry), says(renderer, **entry)])
    asked = body(stop_sequences=["\n\nHuman:"])
    made = desk.post(ACTION, asked).json()
    assert (made["stop_reason"], made["stop_sequence"]) == (reason, sequence)
    assert desk.engine.requests[0].stop == ["\n\nHuman:"]
    last = desk.events(ACTION, asked)[-2]
    assert last["delta"] == {"stop_reason": reason, "stop_sequence": sequence}


def test_a_conversation_with_tools_keeps_its_ids(renderer: Renderer) -> None:
    first = f"Let me see.{calls('1+1')}{calls('2+2')}"
    desk = Desk(renderer, [says(renderer, first), says(renderer, "2 and 4.")], mode="train")
    asked = body(tools=[TOOL], tool_choice={"type": "auto"})
    made = desk.post(ACTION, asked).json()
    assert made["stop_reason"] == "tool_use"
    text, one, two = made["content"]
    assert text == {"type": "text", "text": "Let me see."}
    assert (one["type"], one["name"], one["input"]) == (
        "tool_use",
        "calculator",
        {"expression": "1+1"},
    )
    results = [
        {"type": "tool_result", "tool_use_id": one["id"], "content": "2"},
        {
            "type": "tool_result",
            "tool_use_id": two["id"],
            "content": [{"type": "text", "text": "4"}],
            "cache_control": {"type": "ephemeral"},
        },
        {"type": "text", "text": "And?"},
    ]
    marked = [{**text, "cache_control": {"type": "ephemeral", "ttl": "1h"}}, one, two]
    turns = [
        *asked["messages"],
        {"role": "assistant", "content": marked},
        {"role": "user", "content": results},
    ]
    assert desk.post(ACTION, {**asked, "messages": turns}).json()["stop_reason"] == "end_turn"
    a, b = desk.rows
    assert b["parent_call"] == a["span_id"]
    assert b["attributes"]["agl.retokenized_tokens"] == 0
    assert "agl.branch_reason" not in b["attributes"]
    assert desk.prompt().endswith(
        "<tool_response>\n2\n</tool_response><|im_end|>\n<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_what_the_template_is_given() -> None:
    request = messages.parse(
        json.dumps(
            body(
                system=[
                    {"type": "text", "text": "x-anthropic-billing-header: cc_version=2"},
                    {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
                    {"type": "text", "text": "b"},
                ],
                messages=[
                    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                    {"role": "system", "content": "mind this"},
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "thinking", "thinking": "hm", "signature": "s"},
                            {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}},
                        ],
                    },
                    {
                        "role": "user",
                        "content": [
                            {
                                "type": "tool_result",
                                "tool_use_id": "t1",
                                "content": "no file",
                                "is_error": True,
                            },
                            {"type": "tool_result", "tool_use_id": "t2", "is_error": True},
                        ],
                    },
                ],
                tools=[
                    {**TOOL, "allowed_callers": ["direct"], "input_examples": []},
                    {**TOOL, "name": "later", "defer_loading": True},
                ],
                tool_choice={"type": "none"},
                top_k=0,
                thinking={"type": "adaptive"},
                output_config={"effort": "high"},
                context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            )
        ).encode()
    )
    assert request.messages == [
        {"role": "system", "content": "a\nb"},
        {"role": "user", "content": "hi"},
        {"role": "system", "content": "mind this"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "t1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
            ],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "Error: no file"},
        {"role": "tool", "tool_call_id": "t2", "content": "Error"},
    ]
    function = {
        "name": "calculator",
        "description": "adds",
        "parameters": TOOL["input_schema"],
    }
    assert request.tools == [{"type": "function", "function": function}]
    assert not request.parse_tools
    assert request.sampling == {"max_tokens": 60, "top_k": 0}
    assert request.metadata == {"effort": "high"}
    assert request.thinking is None


def test_a_stream_is_anthropics_events(renderer: Renderer) -> None:
    desk = Desk(renderer, [says(renderer, f"Well.{calls('1+1')}")])
    found = desk.events(ACTION, body(tools=[TOOL], return_token_ids=True))
    kinds = [event["type"] for event in found]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert [kind for kind in kinds if kind != "content_block_delta"] == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_stop",
        "content_block_start",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    start = found[0]["message"]
    assert (start["content"], start["stop_reason"], start["role"]) == ([], None, "assistant")
    assert start["usage"]["input_tokens"] == len(desk.engine.requests[0].prompt_ids)
    blocks = [event for event in found if event["type"] == "content_block_start"]
    assert [event["index"] for event in blocks] == [0, 1]
    assert blocks[0]["content_block"] == {"type": "text", "text": ""}
    tool = blocks[1]["content_block"]
    assert (tool["type"], tool["name"], tool["input"]) == ("tool_use", "calculator", {})
    deltas = [event for event in found if event["type"] == "content_block_delta"]
    text = "".join(event["delta"]["text"] for event in deltas if event["index"] == 0)
    parts = "".join(event["delta"]["partial_json"] for event in deltas if event["index"] == 1)
    assert (text, json.loads(parts)) == ("Well.", {"expression": "1+1"})
    assert {event["delta"]["type"] for event in deltas} == {"text_delta", "input_json_delta"}
    assert found[-2]["delta"]["stop_reason"] == "tool_use"
    assert found[-2]["usage"]["output_tokens"] == len(desk.rows[0]["response_ids"])
    assert found[-2]["token_ids"] == desk.rows[0]["response_ids"]


def test_what_the_recorded_clients_sent_is_answered(renderer: Renderer) -> None:
    """Bodies of Anthropic's own client 2.11, recorded, and one with the fields that its agent program was seen to send."""
    recorded = json.loads((Path(__file__).parent / "gateway_recorded_anthropic.json").read_text())
    for name, sent in recorded.items():
        desk = Desk(renderer, [says(renderer, "Fine.")])
        answer = desk.post(sent["path"], sent["body"], **sent["headers"])
        assert answer.status_code == 200, (name, answer.text)


def test_counting_tokens_counts_those_of_the_call(renderer: Renderer) -> None:
    desk = Desk(renderer, [says(renderer, "2")])
    asked = body(system="Be brief.", tools=[TOOL])
    counted = {key: asked[key] for key in ("model", "messages", "system", "tools")}
    found = desk.post("v1/messages/count_tokens", counted).json()
    assert desk.rows == []
    desk.post(ACTION, asked)
    assert found == {"input_tokens": len(desk.engine.requests[0].prompt_ids)}
    wrong = desk.post("v1/messages/count_tokens", {**counted, "shape": "round"})
    assert wrong.status_code == 400
    assert wrong.json()["type"] == "error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"frobnicate": 1}, "frobnicate"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "some"}, "tools": [TOOL]}, "tool_choice.type"),
        ({"tool_choice": {"type": "tool", "name": "calculator"}}, "tool_choice"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [{**TOOL, "input_examples": [{"a": 1}]}]}, "tools[0].input_examples"),
        (
            {"tools": [TOOL, {**TOOL, "allowed_callers": ["code_execution_20250825"]}]},
            "tools[1].allowed_callers",
        ),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "messages[0].content[0].text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "mood": 1}]}]},
            "messages[0].content[0].mood",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "thinking", "thinking": "x"}]},
                ]
            },
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "assistant", "content": "I"}]}, "messages[0]"),
        ({"thinking": {"type": "sometimes"}}, "thinking.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format"),
        (
            {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
            "context_management.edits[0]",
        ),
        ({"context_management": {"edits": True}}, "context_management.edits"),
        ({"context_management": {"edits": ["clear_thinking"]}}, "context_management.edits[0]"),
        ({"container": "c"}, "container"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"service_tier": "priority"}, "service_tier"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    found = refused(**fields)
    assert found.param == param
    error = json.loads(messages_answer.error_body(found))
    assert set(error) == {"type", "error"}
    assert error["type"] == "error"
    assert error["error"]["type"] == "invalid_request_error"


def test_errors_have_anthropics_body_and_their_status(renderer: Renderer) -> None:
    desk = Desk(renderer, [EngineError("out of memory")])

    def error(answer: Any, status: int) -> dict[str, Any]:
        assert answer.status_code == status
        made = answer.json()
        assert set(made) == {"type", "error"}
        assert set(made["error"]) == {"type", "message"}
        found: dict[str, Any] = made["error"]
        return found

    assert error(desk.post(ACTION, body()), 503)["type"] == "api_error"
    assert error(desk.post(ACTION, b"{"), 400)["type"] == "invalid_request_error"
    assert error(desk.post(ACTION, b"[" * 100_000), 400)["type"] == "invalid_request_error"
    assert error(desk.post(ACTION, b'"\xff"'), 400)["type"] == "invalid_request_error"
    assert error(desk.post(ACTION, body(model="claude")), 404)["type"] == "not_found_error"
    assert "max_tokens" in error(desk.post(ACTION, body(max_tokens=0)), 400)["message"]
    asked = body(thinking={"type": "enabled", "budget_tokens": 1024})
    assert "enable_thinking" in error(desk.post(ACTION, asked), 400)["message"]
    unknown = desk.post("v1/nonsense", body(), **{"anthropic-version": "2023-06-01"})
    assert error(unknown, 404)["type"] == "not_found_error"


def test_an_engine_that_fails_late_is_an_error_event(renderer: Renderer) -> None:
    desk = Desk(renderer, [])
    first = says(renderer, "Well, well.")

    async def half(request: Any) -> Any:
        from agl_ray.gateway.engine_api import GenerateChunk

        for token in first.response_ids[:-1]:
            yield GenerateChunk(response_ids=[token], logprobs=[-0.5])
        raise EngineError("out of memory")

    desk.engine.generate_stream = half  # type: ignore[method-assign]
    found = desk.events(ACTION, body())
    assert found[0]["type"] == "message_start"
    assert found[-1]["type"] == "error"
    assert found[-1]["error"]["type"] == "api_error"
    assert "out of memory" in found[-1]["error"]["message"]


def test_a_malformed_call_of_the_model_comes_back_as_text(renderer: Renderer) -> None:
    for broken in (
        "<tool_call>\n{oops\n</tool_call>",
        '<tool_call>\n{"name": "calculator", "arguments": [1]}\n</tool_call>',
    ):
        desk = Desk(renderer, [says(renderer, broken), says(renderer, broken)])
        made = desk.post(ACTION, body(tools=[TOOL])).json()
        assert made["content"] == [{"type": "text", "text": broken}]
        assert made["stop_reason"] == "end_turn"
        found = desk.events(ACTION, body(tools=[TOOL]))
        text = [event["delta"]["text"] for event in found if event["type"] == "content_block_delta"]
        assert "".join(text) == broken


def test_a_base_url_with_v1_works_too(renderer: Renderer) -> None:
    desk = Desk(renderer, [says(renderer, "2")])
    assert desk.post(f"v1/{ACTION}", body()).status_code == 200


def test_a_thread_is_refused_so_that_the_client_goes_on_without(renderer: Renderer) -> None:
    """The first body of `tool_runner` of Anthropic's client (2.11); at this error code it sends the whole history, without `thread`."""
    desk = Desk(renderer, [])
    answer = desk.post(ACTION, body(tools=[TOOL], thread={"type": "create"}))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["details"]) == (
        "invalid_request_error",
        {"error_code": "thread_unsupported_request", "unsupported": ["thread"]},
    )
    assert "details" not in desk.post(ACTION, body(speed="fast")).json()["error"]
