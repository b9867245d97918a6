"""Answers that must have a form: what the engine is told, what is recorded, and that training refuses them unless it allows them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gateway_desk import Desk, calls, says
from gateway_fakes import save_model_folder

from agl_ray.gateway.render import Renderer

ASKED = [{"role": "user", "content": "1+1?"}]
SCHEMA = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
PARAMETERS = {"type": "object", "properties": {"expression": {"type": "string"}}}
FUNCTION = {"name": "calculator", "parameters": PARAMETERS}
CHAT: dict[str, Any] = {"model": "tiny", "messages": ASKED, "max_tokens": 300}
RESPONSES: dict[str, Any] = {"model": "tiny", "input": "1+1?", "max_output_tokens": 300}
FLAT = {"type": "function", **FUNCTION}

FORMATS = [
    (
        "v1/chat/completions",
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": SCHEMA},
            }
        },
    ),
    ("v1/responses", {"text": {"format": {"type": "json_schema", "name": "s", "schema": SCHEMA}}}),
    ("v1/messages", {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}),
]
CHAT_TOOL = {"tools": [{"type": "function", "function": FUNCTION}]}
CLAUDE_TOOL = {"tools": [{"name": "calculator", "input_schema": PARAMETERS}]}
NAMED = {"type": "function", "function": {"name": "calculator"}}
FORCED = [
    ("v1/chat/completions", {**CHAT_TOOL, "tool_choice": "required"}),
    ("v1/chat/completions", {**CHAT_TOOL, "tool_choice": NAMED}),
    ("v1/responses", {"tools": [FLAT], "tool_choice": "required"}),
    ("v1/responses", {"tools": [FLAT], "tool_choice": {"type": "function", "name": "calculator"}}),
    ("v1/messages", {**CLAUDE_TOOL, "tool_choice": {"type": "any"}}),
    ("v1/messages", {**CLAUDE_TOOL, "tool_choice": {"type": "tool", "name": "calculator"}}),
]


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(save_model_folder(tmp_path_factory.mktemp("model")), "hermes")


def body(action: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {**(RESPONSES if action == "v1/responses" else CHAT), **fields}


@pytest.mark.parametrize(("action", "fields"), FORMATS)
def test_a_schema_goes_to_the_engine(
    renderer: Renderer, action: str, fields: dict[str, Any]
) -> None:
    desk = Desk(renderer, [says(renderer, '{"sum": 2}')])
    assert desk.post(action, body(action, fields)).status_code == 200
    assert desk.engine.requests[0].structure == {"json": SCHEMA}
    assert desk.rows[0]["attributes"]["agl.constrained"] == "json"


def test_any_json_goes_to_the_engine(renderer: Renderer) -> None:
    desk = Desk(renderer, [says(renderer, "{}")])
    desk.post("v1/chat/completions", {**CHAT, "response_format": {"type": "json_object"}})
    assert desk.engine.requests[0].structure == {"json_object": True}


@pytest.mark.parametrize(("action", "fields"), FORCED)
def test_a_forced_call_has_the_models_own_form(
    renderer: Renderer, action: str, fields: dict[str, Any]
) -> None:
    desk = Desk(renderer, [says(renderer, calls("1+1"))])
    made = desk.post(action, body(action, fields))
    assert made.status_code == 200, made.text
    assert "1+1" in made.text
    structure = desk.engine.requests[0].structure
    assert structure is not None
    assert "<tool_call>" in structure["structural_tag"]
    json.loads(structure["structural_tag"])
    assert desk.rows[0]["attributes"]["agl.constrained"] == "tool"


@pytest.mark.parametrize("parallel", [True, False])
def test_a_forced_call_ends_where_the_caller_wants_one_only(
    renderer: Renderer, parallel: bool
) -> None:
    desk = Desk(renderer, [says(renderer, calls("1+1"))])
    action, fields = FORCED[0]
    desk.post(action, {**body(action, fields), "parallel_tool_calls": parallel})
    structure = desk.engine.requests[0].structure
    assert structure is not None
    form = json.loads(structure["structural_tag"])["format"]
    assert form["stop_after_first"] is not parallel
    assert {tag["content"]["max_whitespace_cnt"] for tag in form["tags"]} == {32}


@pytest.mark.parametrize(("action", "fields"), [*FORMATS, FORCED[0], FORCED[2], FORCED[4]])
def test_training_refuses_it_unless_the_rollout_allows_it(
    renderer: Renderer, action: str, fields: dict[str, Any]
) -> None:
    answer = Desk(renderer, [], mode="train").post(action, body(action, fields))
    assert answer.status_code == 400
    assert "allow_constrained" in answer.json()["error"]["message"]
    desk = Desk(
        renderer, [says(renderer, "{}")], mode="train", metadata={"allow_constrained": True}
    )
    assert desk.post(action, body(action, fields)).status_code == 200
    assert "agl.constrained" in desk.rows[0]["attributes"]


@pytest.mark.parametrize(("metadata", "status"), [({}, 200), ({"allow_constrained": False}, 400)])
def test_a_run_may_allow_it_and_a_rollout_has_the_last_word(
    renderer: Renderer, metadata: dict[str, Any], status: int
) -> None:
    desk = Desk(
        renderer, [says(renderer, "{}")], mode="train", metadata=metadata, allow_constrained=True
    )
    action, fields = FORMATS[0]
    assert desk.post(action, body(action, fields)).status_code == status
    assert [row["attributes"].get("agl.constrained") for row in desk.rows] == ["json"][
        : status == 200
    ]


def test_free_answers_have_no_mark(renderer: Renderer) -> None:
    desk = Desk(renderer, [says(renderer, "2")], mode="train")
    desk.post("v1/chat/completions", {**CHAT, "response_format": {"type": "text"}, **CHAT_TOOL})
    assert desk.engine.requests[0].structure is None
    assert "agl.constrained" not in desk.rows[0]["attributes"]


@pytest.mark.parametrize(("action", "fields"), FORCED)
def test_a_format_beside_a_forced_call_is_checked_and_recorded(
    renderer: Renderer, action: str, fields: dict[str, Any]
) -> None:
    """Agents that have an output type send both when a call is forced: the answer is the call, with no text to be formed."""
    desk = Desk(renderer, lambda request: says(renderer, calls("1+1")))
    form = dict(FORMATS)[action]
    assert desk.post(action, body(action, {**fields, **form})).status_code == 200
    assert "structural_tag" in (desk.engine.requests[0].structure or {})
    attributes = desk.rows[0]["attributes"]
    assert attributes["agl.constrained"] == "tool"
    assert SCHEMA in _values(attributes["request"]["metadata"])
    name = next(iter(form))
    nonsense = {"type": "nonsense"} if name == "response_format" else {"format": {"type": "n"}}
    found = desk.post(action, body(action, {**fields, name: nonsense}))
    assert (found.status_code, len(desk.engine.requests)) == (400, 1)
    assert name in found.json()["error"]["message"]
    plain = {"type": "text"} if name == "response_format" else {"format": {"type": "text"}}
    assert desk.post(action, body(action, {**fields, name: plain})).status_code == 200
    assert desk.rows[1]["attributes"]["request"]["metadata"] == {}


def _values(value: Any) -> list[Any]:
    """All objects in a JSON value."""
    inner = list(value.values()) if isinstance(value, dict) else []
    return [value, *(found for one in inner for found in _values(one))]
