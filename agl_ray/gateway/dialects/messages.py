"""The Anthropic messages dialect, requests: body -> `CallRequest`. The blocks of a message are read in messages_blocks.py, the answers
written in messages_answer.py.

Called by: `agl_ray/gateway/http.py`. Every field acts or is refused by name, with these exceptions, which Anthropic's own programs send
unasked and which cannot change an answer here: `cache_control` anywhere (the engine's prefix cache needs no marks),
`metadata.user_id`, `thinking.budget_tokens`, `thinking.display` and `output_config.effort` are recorded with the call and do nothing else; `context_management` is taken where it asks to keep all
thoughts; a system block that starts with "x-anthropic-billing-header" is left out, since it differs from call to call and is not
meant for the model. `thinking` switches the template's `enable_thinking`; `adaptive` leaves it to the template.

`thread` (conversations that Anthropic keeps) is refused with the error code at which its client sends the whole history instead.

Refused on purpose: tools that run on Anthropic's servers, images and documents, an assistant message at
the end (prefill). `tool_choice` any and tool and `output_config.format` are refused in training (constrained.py); where
both are given, the answer is the call, has no text to be formed, and the format is checked and recorded with it.
Test alone: `pytest tests/unit/test_gateway_messages.py`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from agl_ray.gateway.canonical import CallRequest
from agl_ray.gateway.constrained import wish_for_format, wish_for_tool
from agl_ray.gateway.dialects.messages_blocks import (
    CacheControl,
    Message,
    TextBlock,
    conversation,
    system_text,
)
from agl_ray.gateway.dialects.strict import (
    OnlyValues,
    Strict,
    given,
    only,
    read,
    refuse,
    refuse_value,
    shown,
)

NAME = "anthropic.messages"
NO_THREADS = "thread_unsupported_request"  # Anthropic's word for it


class Tool(Strict, frozen=True):
    """`defer_loading`: the model is not shown it. `strict` and `eager_input_streaming` promise nothing here: calls are sampled free."""

    name: str
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    type: str | None = None
    cache_control: CacheControl | None = None
    defer_loading: bool | None = None
    strict: bool | None = None
    eager_input_streaming: bool | None = None
    input_examples: list[Any] | None = None
    allowed_callers: list[str] | None = None


class ToolChoice(Strict, frozen=True):
    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Strict, frozen=True):
    type: str
    budget_tokens: int | None = None
    display: str | None = None


class Metadata(Strict, frozen=True):
    user_id: str | None = None


class OutputConfig(Strict, frozen=True):
    effort: str | None = None
    format: dict[str, Any] | None = None


class ContextManagement(Strict, frozen=True):
    edits: list[dict[str, Any]] | None = None


class CountBody(Strict, frozen=True, kw_only=True):
    """The body of POST /v1/messages/count_tokens, and the part of a call's that makes its prompt."""

    model: str
    messages: list[Message]
    system: str | list[TextBlock] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    context_management: ContextManagement | None = None
    cache_control: CacheControl | None = None


class Body(CountBody, frozen=True, kw_only=True):
    """The body of POST /v1/messages."""

    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
    return_token_ids: bool | None = None
    thread: dict[str, Any] | None = None
    # only one value
    service_tier: str | None = None
    container: Any = None
    mcp_servers: list[Any] | None = None
    inference_geo: str | None = None
    speed: str | None = None


_decoder = msgspec.json.Decoder(Body)
_count_decoder = msgspec.json.Decoder(CountBody)
_ONLY: OnlyValues = {
    "service_tier": (
        lambda v: v in ("auto", "standard_only"),
        "there is one service tier; leave it out",
    ),
    "container": (lambda v: False, "nothing is executed here; leave it out"),
    "mcp_servers": (lambda v: v == [], "nothing is called from here; leave it out"),
    "inference_geo": (lambda v: False, "there is one place; leave it out"),
    "speed": (lambda v: v == "standard", "there is one speed; leave it out"),
}
_THINKING = {"enabled": True, "disabled": False, "adaptive": None}


def parse(body: bytes) -> CallRequest:
    """The canonical request of a messages body; Refusal 400 names the field that is wrong or not supported."""
    message = read(_decoder, body)
    only(message, _ONLY)
    if message.thread is not None:
        refuse(
            "thread",
            "thread is not supported: no conversation is kept here; send all its messages",
            NO_THREADS,
        )
    request = _prompt_part(message)
    metadata = {**request.metadata, **given(user_id=message.metadata and message.metadata.user_id)}
    return msgspec.structs.replace(
        request,
        sampling=given(
            max_tokens=message.max_tokens,
            temperature=message.temperature,
            top_p=message.top_p,
            top_k=message.top_k,
            stop=message.stop_sequences or None,
        ),
        stream=bool(message.stream),
        return_token_ids=bool(message.return_token_ids),
        metadata=metadata,
    )


def parse_count(body: bytes) -> CallRequest:
    """The canonical request of a count_tokens body: as far as the prompt depends on it."""
    return _prompt_part(read(_count_decoder, body))


def _prompt_part(body: CountBody) -> CallRequest:
    _check_context_management(body.context_management)
    tools, parse_tools, forced = _tools(body)
    thinking, output = body.thinking, body.output_config
    if thinking is not None and thinking.type not in _THINKING:
        refuse_value(
            "thinking.type", f"expected enabled, disabled or adaptive, got {thinking.type!r}"
        )
    form = wish_for_format(output.format if output else None, "output_config.format")
    wishes = given(
        effort=output.effort if output else None,
        thinking_budget_tokens=thinking.budget_tokens if thinking else None,
        output_format=output.format if output and forced and form else None,
    )
    messages = conversation(body.messages)
    system = system_text(body.system)
    return CallRequest(
        dialect=NAME,
        model=body.model,
        messages=[*([{"role": "system", "content": system}] if system else []), *messages],
        tools=tools,
        parse_tools=parse_tools,
        parallel=not (body.tool_choice and body.tool_choice.disable_parallel_tool_use),
        thinking=_THINKING[thinking.type] if thinking else None,
        metadata=wishes,
        constraint=forced or form or {},
    )


def _tools(
    body: CountBody,
) -> tuple[list[dict[str, Any]] | None, bool, dict[str, Any] | None]:
    """(tools, whether calls are looked for, the constraint of a forced call)."""
    choice = body.tool_choice
    kind = choice.type if choice else "auto"
    if kind not in ("auto", "none", "any", "tool"):
        refuse_value("tool_choice.type", f"expected auto, none, any or tool, got {kind!r}")
    tools = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools or [])]
    made = [tool for tool in tools if tool is not None]
    if choice is None or kind in ("auto", "none"):
        return made or None, bool(made) and kind == "auto", None
    return made, True, wish_for_tool(choice.name if kind == "tool" else None, made)


def _tool(tool: Tool, at: str) -> dict[str, Any] | None:
    """The template's form of a tool; None: it is not to be shown."""
    if tool.type not in (None, "custom"):
        refuse(
            f"{at}.type",
            f"{at}.type: only tools of the caller's own are supported, got {tool.type!r}",
        )
    if tool.input_examples:
        refuse(
            f"{at}.input_examples",
            f"{at}.input_examples: chat templates have no place for them; put them into the description",
        )
    if tool.allowed_callers not in (None, ["direct"]):
        refuse(
            f"{at}.allowed_callers",
            f"{at}.allowed_callers: only the model calls tools here; expected ['direct'], got {shown(tool.allowed_callers)}",
        )
    if tool.input_schema is None:
        refuse_value(f"{at}.input_schema", "a tool needs it")
    if tool.defer_loading:
        return None
    described = given(description=tool.description)
    schema = {"type": "object", **tool.input_schema}
    function = {"name": tool.name, **described, "parameters": schema}
    return {"type": "function", "function": function}


def _check_context_management(wished: ContextManagement | None) -> None:
    """Only what changes nothing is taken: to keep all thoughts, as Claude's programs ask for."""
    for index, edit in enumerate((wished and wished.edits) or []):
        kind = edit.get("type")
        keeps = isinstance(kind, str) and kind.startswith("clear_thinking")
        if not keeps or edit.get("keep") != "all":
            refuse(
                f"context_management.edits[{index}]",
                f"context_management.edits[{index}]={shown(edit)} is not supported: the conversation is sent as it is given",
            )
