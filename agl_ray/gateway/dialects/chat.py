"""The OpenAI chat completions dialect, requests: body -> `CallRequest`. The answers are in chat_answer.py.

Called by: `agl_ray/gateway/http.py`. Every field of the request either acts or is refused with status 400 and OpenAI's error
body naming the field; nothing is ignored (contract 8). A null counts as not given. Test alone:
`pytest tests/unit/test_gateway_chat.py`.

Of an answer with several tool calls, `parallel_tool_calls: false` shows the first, as vLLM does. Refused on purpose: `top_logprobs` > 0
(the engine reports the sampled token's logprob only). `response_format` and a forced `tool_choice` are refused in training (constrained.py); where
both are given, the answer is the call, has no text to be formed, and the format is checked and recorded with it.
`chat_template_kwargs` and `reasoning_effort` go to the model's chat template and are refused where it does not know them. Where the
run has a reasoning parser, an answer's thoughts are in `reasoning_content` and `reasoning`; either may be sent back.
"""

from __future__ import annotations

from typing import Any

import msgspec

from agl_ray.gateway.canonical import CallRequest, Refusal, json_object
from agl_ray.gateway.constrained import wish_for_format, wish_for_tool
from agl_ray.gateway.dialects.strict import (
    OnlyValues,
    Strict,
    given,
    only,
    read,
    refuse,
    refuse_value,
    several,
    shown,
)

NAME = "openai.chat"


class Part(Strict, frozen=True):
    type: str
    text: str | None = None


class FunctionCall(Strict, frozen=True):
    name: str
    arguments: str = ""


class RequestToolCall(Strict, frozen=True):
    function: FunctionCall
    id: str | None = None
    type: str = "function"
    index: int | None = None


class Message(Strict, frozen=True):
    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[RequestToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: Any = None
    function_call: Any = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class StreamOptions(Strict, frozen=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatBody(Strict, frozen=True, kw_only=True):
    """The body of POST /v1/chat/completions. Fields after `# only one value` are accepted with that value alone."""

    model: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    logprobs: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    return_token_ids: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    response_format: dict[str, Any] | None = None
    n: int | None = None
    parallel_tool_calls: bool | None = None
    # only one value
    top_logprobs: int | None = None
    logit_bias: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None


_decoder = msgspec.json.Decoder(ChatBody)
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

_ONLY: OnlyValues = {
    "top_logprobs": (
        lambda v: v == 0,
        "the engine reports the logprob of the sampled token only; use `logprobs` alone",
    ),
    "logit_bias": (lambda v: v == {}, "answers are sampled from the model's own distribution"),
    "store": (lambda v: v is False, "there is no store of completions here; leave it out"),
    "service_tier": (lambda v: v in ("auto", "default"), "there is one service tier; leave it out"),
}


def parse(body: bytes) -> CallRequest:
    """The canonical request of a chat completions body; Refusal 400 names the field that is wrong or not supported."""
    chat = read(_decoder, body)
    only(chat, _ONLY)
    options = chat.stream_options
    if options is not None and not chat.stream:
        refuse("stream_options", "stream_options is only allowed when stream is true")
    if options is not None and options.include_obfuscation:
        refuse("stream_options.include_obfuscation", "include_obfuscation is not supported")
    tools, parse_tools, forced = _tools(chat)
    form = wish_for_format(chat.response_format, "response_format")
    beside = given(response_format=chat.response_format) if forced and form else {}
    template = {
        **(chat.chat_template_kwargs or {}),
        **given(reasoning_effort=chat.reasoning_effort),
    }
    return CallRequest(
        dialect=NAME,
        model=chat.model,
        messages=_messages(chat.messages),
        tools=tools,
        parse_tools=parse_tools,
        sampling=_sampling(chat),
        n=several(chat.n),
        parallel=chat.parallel_tool_calls is not False,
        stream=bool(chat.stream),
        include_usage=bool(options and options.include_usage),
        logprobs=bool(chat.logprobs),
        return_token_ids=bool(chat.return_token_ids),
        metadata={**(chat.metadata or {}), **given(user=chat.user), **beside},
        template=template,
        constraint=forced or form or {},
    )


def _tools(
    chat: ChatBody,
) -> tuple[list[dict[str, Any]] | None, bool, dict[str, Any] | None]:
    """(tools, whether calls are looked for, the constraint of a forced call)."""
    choice = chat.tool_choice
    for index, tool in enumerate(chat.tools or []):
        function = tool.get("function")
        if (
            tool.get("type") != "function"
            or not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
        ):
            refuse_value(
                f"tools[{index}]", "expected {'type': 'function', 'function': {'name': ...}}"
            )
    tools = chat.tools or None
    if choice in (None, "auto", "none"):
        return tools, tools is not None and choice != "none", None
    function = choice.get("function") if isinstance(choice, dict) else None
    named = function.get("name") if isinstance(function, dict) else None
    if choice != "required" and not isinstance(named, str):
        refuse_value(
            "tool_choice", f"expected auto, none, required or a function, got {shown(choice)}"
        )
    return tools, True, wish_for_tool(named, tools)


def _sampling(chat: ChatBody) -> dict[str, Any]:
    if chat.max_tokens is not None and chat.max_completion_tokens not in (None, chat.max_tokens):
        refuse("max_completion_tokens", "max_tokens and max_completion_tokens differ; give one")
    limit = chat.max_completion_tokens if chat.max_tokens is None else chat.max_tokens
    stop = [chat.stop] if isinstance(chat.stop, str) else chat.stop
    return given(
        temperature=chat.temperature,
        top_p=chat.top_p,
        top_k=chat.top_k,
        min_p=chat.min_p,
        presence_penalty=chat.presence_penalty,
        frequency_penalty=chat.frequency_penalty,
        repetition_penalty=chat.repetition_penalty,
        max_tokens=limit,
        stop=stop or None,
        seed=chat.seed,
    )


def _messages(messages: list[Message]) -> list[dict[str, Any]]:
    if not messages:
        raise Refusal(
            400, "messages: expected at least one message", param="messages", code="empty_array"
        )
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Message, at: str) -> dict[str, Any]:
    """The template's form of a message. `developer` is OpenAI's newer word for `system`."""
    for field in ("refusal", "annotations", "audio", "function_call"):
        if getattr(message, field):
            refuse(f"{at}.{field}", f"{at}.{field} is not supported: leave it out")
    role = "tool" if message.role == "tool" else _ROLES.get(message.role)
    if role is None:
        refuse_value(
            f"{at}.role",
            f"expected system, developer, user, assistant or tool, got {message.role!r}",
        )
    if message.tool_calls and role != "assistant":
        raise Refusal(
            400, f"{at}.tool_calls: only an assistant message has them", param=f"{at}.tool_calls"
        )
    if message.content is None and role != "assistant":
        raise Refusal(400, f"{at}.content: expected text, got null", param=f"{at}.content")
    if role == "tool" and message.tool_call_id is None:
        raise Refusal(
            400, f"{at}.tool_call_id: a tool message needs it", param=f"{at}.tool_call_id"
        )
    made: dict[str, Any] = {"role": role, "content": _text(message.content, at)}
    if message.name is not None:
        made["name"] = message.name
    if message.tool_call_id is not None:
        made["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        made["tool_calls"] = [_tool_call(call, at) for call in message.tool_calls]
    reasoning = message.reasoning_content or message.reasoning
    if reasoning and role != "assistant":
        refuse_value(f"{at}.reasoning_content", "only an assistant message has it")
    if reasoning:
        made["reasoning_content"] = reasoning
    return made


def _text(content: str | list[Part] | None, at: str) -> str:
    if isinstance(content, str):
        return content
    for index, part in enumerate(content or []):
        if part.type != "text" or part.text is None:
            refuse(
                f"{at}.content[{index}]",
                f"{at}.content[{index}]: only text parts are supported, got {part.type!r}",
            )
    return "\n".join(part.text or "" for part in content or [])  # as vLLM joins them


def _tool_call(call: RequestToolCall, at: str) -> dict[str, Any]:
    if call.type != "function":
        refuse(f"{at}.tool_calls", f"{at}.tool_calls: expected type 'function', got {call.type!r}")
    function = {"name": call.function.name, "arguments": json_object(call.function.arguments)}
    return {"id": call.id, "type": "function", "function": function}
