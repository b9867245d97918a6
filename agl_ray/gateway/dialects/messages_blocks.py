"""The blocks of Anthropic's messages, turned into the messages that chat templates take.

One message of Anthropic's may become several: the results of tools are messages of their own. Called by: messages.py.
Test alone: `pytest tests/unit/test_gateway_messages.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NoReturn

from agl_ray.gateway.canonical import Refusal
from agl_ray.gateway.dialects.strict import Strict, refuse, refuse_value

BILLING = "x-anthropic-billing-header"


class CacheControl(Strict, frozen=True):
    """A mark for Anthropic's prompt cache; it does nothing here."""

    type: str
    ttl: str | None = None
    scope: str | None = None


class Block(Strict, frozen=True, tag_field="type", kw_only=True):
    cache_control: CacheControl | None = None


class TextBlock(Block, frozen=True, tag="text"):
    text: str
    citations: list[Any] | None = None


class ThinkingBlock(Block, frozen=True, tag="thinking"):
    thinking: str
    signature: str | None = None


class ToolUseBlock(Block, frozen=True, tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]
    caller: Any = None


class ToolResultBlock(Block, frozen=True, tag="tool_result"):
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None


AnyBlock = TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock


class Message(Strict, frozen=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[AnyBlock]


def system_text(system: str | list[TextBlock] | None) -> str:
    """The text of the system prompt; empty: there is none."""
    if system is None or isinstance(system, str):
        return system or ""
    return joined(block.text for block in system if not block.text.startswith(BILLING))


def conversation(messages: list[Message]) -> list[dict[str, Any]]:
    """All messages in the templates' form; Refusal where a block stands in a message that cannot have it."""
    if not messages:
        raise Refusal(
            400, "messages: expected at least one message", param="messages", code="empty_array"
        )
    if messages[-1].role == "assistant":
        refuse(
            f"messages[{len(messages) - 1}]",
            "messages: the last one is the assistant's; an answer cannot be begun for the model here, so end with a user message",
        )
    made: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        at = f"messages[{index}].content"
        if message.role == "assistant":
            made.append(_assistant(message.content, at))
        elif message.role == "user":
            made += _user(message.content, at)
        else:
            made.append({"role": "system", "content": _system(message.content, at)})
    return made


def joined(texts: Iterable[str]) -> str:
    return "\n".join(texts)  # as the chat dialect joins the parts of a content


def _system(content: str | list[AnyBlock], at: str) -> str:
    if isinstance(content, str):
        return content
    texts: list[TextBlock] = []
    for index, block in enumerate(content):
        if not isinstance(block, TextBlock):
            _misplaced(block, f"{at}[{index}]", "system")
        texts.append(block)
    return system_text(texts)


def _user(content: str | list[AnyBlock], at: str) -> list[dict[str, Any]]:
    """A user message for each run of texts, a tool message for each result, in their order."""
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    made: list[dict[str, Any]] = []
    texts: list[str] = []
    for index, block in enumerate(content):
        if isinstance(block, TextBlock):
            texts.append(block.text)
            continue
        if not isinstance(block, ToolResultBlock):
            _misplaced(block, f"{at}[{index}]", "user")
        if texts:
            made.append({"role": "user", "content": joined(texts)})
            texts = []
        made.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": _result(block)})
    if texts or not made:
        made.append({"role": "user", "content": joined(texts)})
    return made


def _result(block: ToolResultBlock) -> str:
    """The text of a tool's result. Templates know no failed results, so the text says it, where it does not by itself."""
    content = block.content or ""
    text = content if isinstance(content, str) else joined(part.text for part in content)
    if not block.is_error or text.lstrip().lower().startswith(("error", "<tool_use_error")):
        return text
    return f"Error: {text}" if text else "Error"


def _assistant(content: str | list[AnyBlock], at: str) -> dict[str, Any]:
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, block in enumerate(content):
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            function = {"name": block.name, "arguments": block.input}
            calls.append({"id": block.id, "type": "function", "function": function})
        else:
            _misplaced(block, f"{at}[{index}]", "assistant")
    made: dict[str, Any] = {"role": "assistant", "content": joined(texts)}
    if thoughts:
        made["reasoning_content"] = joined(thoughts)
    if calls:
        made["tool_calls"] = calls
    return made


def _misplaced(block: AnyBlock, at: str, role: str) -> NoReturn:
    name = type(block).__struct_config__.tag
    refuse_value(at, f"a message of role {role!r} has no {name} block")
