"""Any JSON at any place of a request is read or refused by a Refusal with a status of 400: no dialect fails on it."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agl_ray.gateway.canonical import CallRequest, Refusal
from agl_ray.gateway.dialects.table import DIALECTS

FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BODIES: dict[str, dict[str, Any]] = {
    "v1/chat/completions": {
        "model": "m",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "x"}], "name": "n"},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "r"},
            {"role": "tool", "tool_call_id": "c", "content": "1"},
        ],
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {}}},
        "stream": True,
        "stream_options": {"include_usage": True},
        "stop": ["a"],
        "metadata": {"k": "v"},
        "chat_template_kwargs": {"enable_thinking": True},
        "max_tokens": 5,
    },
    "v1/completions": {
        "model": "m",
        "prompt": [[1, 2]],
        "stop": "x",
        "logprobs": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 5,
    },
    "v1/responses": {
        "model": "m",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
            {
                "type": "reasoning",
                "id": "r",
                "summary": [],
                "content": [{"type": "t", "text": "x"}],
            },
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "1"},
        ],
        "tools": [{"type": "function", **FUNCTION}],
        "tool_choice": {"type": "function", "name": "f"},
        "text": {"format": {"type": "json_schema", "name": "s", "schema": {}}},
        "include": ["reasoning.encrypted_content"],
        "reasoning": {"effort": "low"},
        "previous_response_id": "resp_x",
        "metadata": {"k": "v"},
    },
    "v1/messages": {
        "model": "m",
        "max_tokens": 5,
        "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": "x"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "t", "signature": "s"},
                    {"type": "text", "text": "x"},
                    {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "c",
                        "content": [{"type": "text", "text": "1"}],
                        "is_error": True,
                    }
                ],
            },
        ],
        "tools": [{"name": "f", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "tool", "name": "f"},
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {}}},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "metadata": {"user_id": "u"},
    },
}

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything inside a JSON value."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    found = []
    for key, inner in items:
        found += [(*path, key), *places(inner, (*path, key))]
    return found


def refused(action: str, body: Any) -> Refusal | None:
    try:
        DIALECTS[action].parse(json.dumps(body).encode())
    except Refusal as refusal:
        return refusal
    return None


@pytest.mark.parametrize("action", list(BODIES))
def test_the_body_itself_is_read(action: str) -> None:
    assert isinstance(DIALECTS[action].parse(json.dumps(BODIES[action]).encode()), CallRequest)


@pytest.mark.parametrize("action", list(BODIES))
@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_anything_anywhere_is_read_or_refused(action: str, data: st.DataObject) -> None:
    body = copy.deepcopy(BODIES[action])
    for path in data.draw(st.lists(st.sampled_from(places(body)), min_size=1, max_size=2)):
        target: Any = body
        try:
            for key in path[:-1]:
                target = target[key]
            target[path[-1]] = data.draw(anything)
        except (KeyError, IndexError, TypeError):
            continue  # the first change took the second's place away
    refusal = refused(action, body)
    assert refusal is None or refusal.status == 400
    assert refusal is None or json.loads(DIALECTS[action].error(refusal))
