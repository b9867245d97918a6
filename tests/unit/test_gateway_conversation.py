"""Suffix-form calls give the whole conversation again."""

from __future__ import annotations

import json
from typing import Any

from agl_ray.gateway.conversation import conversation


def call(first: int, messages: list[Any], response: Any) -> dict[str, Any]:
    request = {"messages_from": first, "messages": messages}
    attributes = {"request": json.dumps(request), "response": json.dumps(response)}
    return {"kind": "call", "attributes": attributes}


def test_turns_are_joined_and_other_spans_passed_over() -> None:
    spans = [
        call(0, ["system", "question"], "tool call"),
        {"kind": "reward", "attributes": None},
        call(3, ["tool result"], "answer"),
    ]
    expected = ["system", "question", "tool call", "tool result", "answer"]
    assert conversation(spans) == expected


def test_a_second_conversation_replaces_the_first() -> None:
    spans = [call(0, ["a"], "b"), call(0, ["c"], "d")]
    assert conversation(spans) == ["c", "d"]


def test_no_calls_is_an_empty_conversation() -> None:
    assert conversation([{"kind": "span", "attributes": None}]) == []
