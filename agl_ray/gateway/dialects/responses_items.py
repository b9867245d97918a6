"""The items of a responses `input`, turned into the messages that chat templates take.

What one answer said comes as several items (a reasoning item, a message, function calls); they become one assistant message again.
Called by: responses.py. Test alone: `pytest tests/unit/test_gateway_responses.py`.
"""

from __future__ import annotations

from typing import Any

from agl_ray.gateway.canonical import json_object
from agl_ray.gateway.dialects.strict import Strict, convert, refuse, refuse_value

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_TEXTS = ("input_text", "output_text", "text")


class Part(Strict, frozen=True):
    type: str
    text: str | None = None
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    refusal: str | None = None


class MessageItem(Strict, frozen=True):
    role: str
    content: str | list[Part]
    type: str = "message"
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class CallItem(Strict, frozen=True):
    type: str
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None
    namespace: str | None = None


class OutputItem(Strict, frozen=True):
    type: str
    call_id: str
    output: str | list[Part]
    id: str | None = None
    status: str | None = None


class Thought(Strict, frozen=True):
    type: str
    text: str


class ReasoningItem(Strict, frozen=True):
    type: str
    id: str | None = None
    summary: list[Thought] | None = None
    content: list[Thought] | None = None
    encrypted_content: str | None = None
    status: str | None = None


def conversation(given: str | list[dict[str, Any]], continues: bool) -> list[dict[str, Any]]:
    """The messages of an `input`. Refusal where it is empty, unless it `continues` an earlier answer."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not given and not continues:
        refuse_value("input", "expected at least one item")
    reader = _Reader()
    for index, item in enumerate(given):
        reader.item(item, f"input[{index}]")
    return reader.messages


class _Reader:
    """Takes items in order; `messages` are those so far."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._answer: dict[str, Any] | None = (
            None  # the assistant message that further items belong to
        )

    def item(self, item: dict[str, Any], at: str) -> None:
        kind = item.get("type") or ("message" if "role" in item else None)
        if kind == "message":
            self._message(convert(item, MessageItem, at), at)
        elif kind == "function_call":
            self._call(convert(item, CallItem, at))
        elif kind == "function_call_output":
            output = convert(item, OutputItem, at)
            text = _text(output.output, f"{at}.output")
            self._other({"role": "tool", "tool_call_id": output.call_id, "content": text})
        elif kind == "reasoning":
            self._reasoning(convert(item, ReasoningItem, at))
        else:
            refuse(
                f"{at}.type",
                f"{at}.type: expected message, function_call, function_call_output or reasoning, got {kind!r}",
            )

    def _other(self, message: dict[str, Any]) -> None:
        self._answer = None
        self.messages.append(message)

    def _said(self, follows: bool) -> dict[str, Any]:
        """The assistant message to add to: the one before, if this `follows` in it, or a new one."""
        if self._answer is None or not follows:
            self._answer = {"role": "assistant", "content": ""}
            self.messages.append(self._answer)
        return self._answer

    def _message(self, item: MessageItem, at: str) -> None:
        role = _ROLES.get(item.role)
        if role is None:
            refuse_value(
                f"{at}.role", f"expected system, developer, user or assistant, got {item.role!r}"
            )
        text = _text(item.content, f"{at}.content")
        if role != "assistant":
            self._other({"role": role, "content": text})
            return
        before = self._answer
        fresh = before is not None and not before["content"] and "tool_calls" not in before
        self._said(follows=fresh)["content"] = text

    def _call(self, item: CallItem) -> None:
        function = {"name": item.name, "arguments": json_object(item.arguments)}
        call = {"id": item.call_id, "type": "function", "function": function}
        self._said(follows=True).setdefault("tool_calls", []).append(call)

    def _reasoning(self, item: ReasoningItem) -> None:
        """Thoughts open an answer. Those that were given in the open come back so; a summary alone is not what the model wrote."""
        answer = self._said(follows=False)
        if item.content:
            answer["reasoning_content"] = "\n".join(thought.text for thought in item.content)


def _text(content: str | list[Part], at: str) -> str:
    if isinstance(content, str):
        return content
    for index, part in enumerate(content):
        if part.type not in _TEXTS or part.text is None:
            refuse(
                f"{at}[{index}]", f"{at}[{index}]: only text parts are supported, got {part.type!r}"
            )
    return "\n".join(part.text or "" for part in content)
