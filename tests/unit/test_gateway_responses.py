"""The responses dialect: items in and out, state by previous_response_id, events in their order."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gateway_desk import Desk, calls, says
from gateway_fakes import save_model_folder

from agl_ray.gateway.canonical import Refusal
from agl_ray.gateway.dialects import responses
from agl_ray.gateway.render import Renderer
from agl_ray.types import EngineError

ACTION = "v1/responses"
TOOL = {
    "type": "function",
    "name": "calculator",
    "description": "adds",
    "parameters": {"type": "object"},
    "strict": True,
}


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(save_model_folder(tmp_path_factory.mktemp("model")), "hermes")


def body(given: Any = "1+1?", **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "input": given, **fields}


def result_of(call: dict[str, Any], text: Any) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call["call_id"], "output": text}


def test_an_answer_in_words(renderer: Renderer) -> None:
    desk = Desk(renderer, [says(renderer, "It is 2.")])
    asked = body(
        instructions="Be brief.",
        temperature=0.5,
        max_output_tokens=50,
        metadata={"k": "v"},
        include=["reasoning.encrypted_content", "message.output_text.logprobs"],
        truncation="disabled",
        return_token_ids=True,
    )
    made = desk.post(ACTION, asked).json()
    assert (made["object"], made["status"], made["error"]) == ("response", "completed", None)
    (item,) = made["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    (part,) = item["content"]
    assert (part["type"], part["text"], part["annotations"]) == ("output_text", "It is 2.", [])
    ids = desk.rows[0]["response_ids"]
    assert [one["logprob"] for one in part["logprobs"]] == [-0.5] * len(ids)
    assert made["token_ids"] == ids
    assert made["usage"]["output_tokens"] == len(ids)
    assert made["usage"]["input_tokens_details"]["cached_tokens"] == 4
    assert (made["instructions"], made["temperature"]) == ("Be brief.", 0.5)
    assert made["metadata"] == {"k": "v"}
    assert desk.prompt().startswith("<|im_start|>system\nBe brief.<|im_end|>")
    request = desk.rows[0]["attributes"]["request"]
    assert request["metadata"]["include"] == asked["include"]
    assert desk.rows[0]["dialect"] == "openai.responses"


def test_a_cut_answer_is_incomplete(renderer: Renderer) -> None:
    desk = Desk(renderer, [says(renderer, "It", end=False)])
    made = desk.post(ACTION, body()).json()
    assert made["status"] == "incomplete"
    assert made["incomplete_details"] == {"reason": "max_output_tokens"}


@pytest.mark.parametrize("how", ["previous", "previous after a restart", "all items"])
def test_a_conversation_with_tools_keeps_its_ids(renderer: Renderer, how: str) -> None:
    first = f"Let me see.{calls('1+1')}{calls('2+2')}"
    script = [says(renderer, first), says(renderer, "2 and 4."), says(renderer, "Yes.")]
    desk = Desk(renderer, script, mode="train")
    asked = body(tools=[TOOL], instructions="Be brief.")
    made = desk.post(ACTION, asked).json()
    said, one, two = made["output"]
    assert (said["type"], one["type"], two["type"]) == ("message", "function_call", "function_call")
    assert json.loads(one["arguments"]) == {"expression": "1+1"}
    assert one["id"] != two["id"]
    results = [result_of(one, "2"), result_of(two, [{"type": "input_text", "text": "4"}])]
    if how == "all items":
        user = {"role": "user", "content": [{"type": "input_text", "text": "1+1?"}]}
        again = {**asked, "input": [user, *made["output"], *results], "store": False}
    else:
        again = {**asked, "input": results, "previous_response_id": made["id"]}
    if how == "previous after a restart":
        desk.restart()
    second = desk.post(ACTION, again).json()
    assert second["output"][0]["content"][0]["text"] == "2 and 4."
    a, b = desk.rows
    assert b["parent_call"] == a["span_id"]
    assert b["attributes"]["agl.retokenized_tokens"] == 0
    assert "agl.branch_reason" not in b["attributes"]
    assert b["attributes"]["request"]["messages_from"] == 2
    if how == "all items":
        return
    desk.restart()
    third = {**asked, "input": "Sure?", "previous_response_id": second["id"]}
    assert desk.post(ACTION, third).status_code == 200
    assert desk.rows[2]["parent_call"] == b["span_id"]
    assert desk.prompt().count("Be brief.") == 1
    assert desk.prompt().endswith("<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n")


def test_instructions_are_not_carried_over(renderer: Renderer) -> None:
    desk = Desk(renderer, [says(renderer, "a"), says(renderer, "b")])
    made = desk.post(ACTION, body(instructions="Be brief.")).json()
    desk.post(ACTION, body("And?", instructions="Be kind.", previous_response_id=made["id"]))
    assert desk.prompt().startswith(
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n1+1?"
    )
    assert "Be brief" not in desk.prompt()


def test_what_was_not_stored_is_not_found(renderer: Renderer) -> None:
    desk = Desk(renderer, [says(renderer, "a")])
    made = desk.post(ACTION, body(store=False)).json()
    assert made["store"] is False
    for name in (made["id"], "resp_unknown", "nonsense"):
        answer = desk.post(ACTION, body("And?", previous_response_id=name))
        error = answer.json()["error"]
        assert answer.status_code == 404
        assert (error["code"], error["param"]) == (
            "previous_response_not_found",
            "previous_response_id",
        )
    assert len(desk.engine.requests) == 1


def test_what_the_template_is_given() -> None:
    call = {
        "type": "function_call",
        "call_id": "c",
        "name": "f",
        "arguments": '{"a": 1}',
        "id": "i",
    }
    given = [
        {"role": "developer", "content": "d"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "hm"}],
            "encrypted_content": None,
        },
        {
            "type": "message",
            "role": "assistant",
            "id": "msg_1",
            "status": "completed",
            "content": [{"type": "output_text", "text": "so", "annotations": [], "logprobs": []}],
        },
        call,
        {**call, "call_id": "d", "arguments": "{oops"},
        {"type": "function_call_output", "call_id": "c", "output": "1"},
        {"type": "function_call_output", "call_id": "d", "output": "2"},
        {"type": "message", "role": "assistant", "content": "done"},
        {"type": "message", "role": "assistant", "content": "really"},
    ]
    request = responses.parse(json.dumps(body(given, tools=[TOOL])).encode())

    def made(name: str, arguments: Any) -> dict[str, Any]:
        function = {"name": "f", "arguments": arguments}
        return {"id": name, "type": "function", "function": function}

    assert request.messages == [
        {"role": "system", "content": "d"},
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": "so",
            "reasoning_content": "hm",
            "tool_calls": [made("c", {"a": 1}), made("d", "{oops")],
        },
        {"role": "tool", "tool_call_id": "c", "content": "1"},
        {"role": "tool", "tool_call_id": "d", "content": "2"},
        {"role": "assistant", "content": "done"},
        {"role": "assistant", "content": "really"},
    ]
    function = {"name": "calculator", "description": "adds", "parameters": {"type": "object"}}
    assert request.tools == [{"type": "function", "function": function}]


def test_the_events_of_a_stream(renderer: Renderer) -> None:
    desk = Desk(renderer, [says(renderer, f"Well.{calls('1+1')}")])
    asked = body(tools=[TOOL], include=["message.output_text.logprobs"])
    found = desk.events(ACTION, asked)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    kinds = [event["type"].removeprefix("response.") for event in found]
    text = [index for index, kind in enumerate(kinds) if kind == "output_text.delta"]
    assert [kind for kind in kinds if kind != "output_text.delta"] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    assert (text[0], "".join(found[index]["delta"] for index in text)) == (4, "Well.")
    assert found[0]["response"]["status"] == "in_progress"
    assert found[0]["response"]["output"] == []
    response = found[-1]["response"]
    assert response["id"] == found[0]["response"]["id"]
    assert [item["type"] for item in response["output"]] == ["message", "function_call"]
    done = [event["item"] for event in found if event["type"] == "response.output_item.done"]
    assert [item["id"] for item in done] == [item["id"] for item in response["output"]]
    assert done[1] == response["output"][1]
    assert {event["item_id"] for event in found if "item_id" in event} == {
        item["id"] for item in done
    }
    part = response["output"][0]["content"][0]
    assert len(part["logprobs"]) == len(desk.rows[0]["response_ids"])
    assert response["usage"]["output_tokens"] == len(desk.rows[0]["response_ids"])


def test_a_stream_that_is_cut_is_incomplete(renderer: Renderer) -> None:
    for text in ("It", ""):
        desk = Desk(renderer, [says(renderer, text, end=False) if text else ([], "length")])
        last = desk.events(ACTION, body())[-1]
        assert last["type"] == "response.incomplete"
        assert last["response"]["output"][0]["content"][0]["text"] == text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"frobnicate": 1}, "frobnicate"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": "x", "mood": 1}]}, "input[0].mood"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0]",
        ),
        ({"input": [{"role": "user", "content": [{"type": 5}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}, "tools": [TOOL]}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "schema": 5}}}, "text.format"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"include": ["everything"]}, "include"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        (
            {"stream": True, "stream_options": {"include_usage": True}},
            "stream_options.include_usage",
        ),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
        ),
        ({"truncation": "auto"}, "truncation"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"max_output_tokens": "x"}, "max_output_tokens"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal) as caught:
        responses.parse(json.dumps(body(**fields)).encode())
    assert caught.value.status == 400
    assert caught.value.param == param


def test_what_changes_nothing_is_recorded() -> None:
    wished = {"effort": "low", "summary": "auto", "generate_summary": "concise"}
    options = {"stream": True, "stream_options": {"include_obfuscation": False}}
    asked = body(reasoning=wished, include=["reasoning.encrypted_content"], **options)
    request = responses.parse(json.dumps(asked).encode())
    assert request.metadata == {
        "include": ["reasoning.encrypted_content"],
        "reasoning_summary": "auto",
        "reasoning_generate_summary": "concise",
    }
    assert request.template == {"reasoning_effort": "low"}


def test_errors_are_openais(renderer: Renderer) -> None:
    desk = Desk(renderer, [EngineError("out of memory")])

    def code(asked: Any, status: int) -> Any:
        answer = desk.post(ACTION, asked)
        assert answer.status_code == status, answer.text
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        return answer.json()["error"]["code"]

    assert code(body(), 503) == "engine_error"
    assert code(b"{", 400) is None
    assert code(body(max_output_tokens=0), 400) == "invalid_value"
    assert code(body(model="gpt"), 404) == "model_not_found"
    assert code(body(reasoning={"effort": "high"}), 400) == "unsupported_parameter"


def test_a_malformed_call_of_the_model_comes_back_as_text(renderer: Renderer) -> None:
    broken = "<tool_call>\n{oops\n</tool_call>"
    desk = Desk(renderer, [says(renderer, broken), says(renderer, "Sorry.")])
    made = desk.post(ACTION, body(tools=[TOOL])).json()
    assert made["output"][0]["content"][0]["text"] == broken
    desk.post(ACTION, body("What?", tools=[TOOL], previous_response_id=made["id"]))
    assert desk.rows[1]["attributes"]["agl.retokenized_tokens"] == 0
