"""Suffix-form calls give the whole conversation again."""

from __future__ import annotations

import json
from typing import Any

from agl_ray.gateway.conversation import conversation


def call(
    first: int, messages: list[Any], response: Any, name: str = "c", parent: str | None = None
) -> dict[str, Any]:
    request = {"messages_from": first, "messages": messages}
    attributes = {"request": json.dumps(request), "response": json.dumps(response)}
    return {"kind": "call", "span_id": name, "parent_call": parent, "attributes": attributes}


def test_turns_are_joined_and_other_spans_passed_over() -> None:
    spans = [
        call(0, ["system", "question"], "tool call"),
        {"kind": "reward", "attributes": None},
        call(3, ["tool result"], "answer", "d", "c"),
    ]
    expected = ["system", "question", "tool call", "tool result", "answer"]
    assert conversation(spans) == expected


def test_a_second_conversation_replaces_the_first() -> None:
    spans = [call(0, ["a"], "b"), call(0, ["c"], "d")]
    assert conversation(spans) == ["c", "d"]


def test_roles_that_talk_in_turns_are_kept_apart() -> None:
    spans = [
        call(0, ["plan"], "1", "p1"),
        call(0, ["judge"], "good", "j1"),
        call(2, ["go on"], "2", "p2", "p1"),
    ]
    assert conversation(spans) == ["plan", "1", "go on", "2"]


def test_attributes_may_come_decoded() -> None:
    one = call(0, ["question"], '"answer"')
    decoded = {key: json.loads(value) for key, value in one["attributes"].items()}
    assert conversation([{**one, "attributes": {**decoded, "agl.role_kind": "frozen"}}]) == [
        "question",
        "answer",
    ]


def test_no_calls_is_an_empty_conversation() -> None:
    assert conversation([{"kind": "span", "attributes": None}]) == []


def test_raw_prompts_are_shown_with_what_they_go_on_from() -> None:
    def raw(rest: str, answer: str, parent: str | None) -> dict[str, Any]:
        made = call(0, [], answer)
        made["attributes"]["agl.session"] = json.dumps({"rest": rest})
        return {**made, "span_id": answer, "parent_call": parent}

    first, second = {"role": "prompt", "content": "1+1="}, {"role": "prompt", "content": "+1="}
    spans = [raw("1+1=", "2", None), raw("+1=", "3", "2")]
    assert conversation(spans) == [first, "2", second, "3"]
    assert conversation([*spans, raw("1+1=", "4", None)]) == [first, "4"]
