"""The OpenAI responses dialect, requests: body -> `CallRequest`. The items of `input` are read in responses_items.py, the answers
written in responses_answer.py and responses_stream.py.

Called by: `agl_ray/gateway/http.py`. `previous_response_id` goes on from an earlier answer of the same attempt and role, with that
call's conversation but without its `instructions`; what was asked for with `store: false` cannot be named. The state is the attempt's
recorded calls, so it outlives the gateway process. Every field acts or is refused by name, with these exceptions, which are recorded
with the call and cannot change an answer here: `prompt_cache_key`, `safety_identifier`, `user`, `reasoning.summary` and
`reasoning.generate_summary` (thoughts are given whole), and in `include` whatever asks for
parts that no answer here has (`reasoning.encrypted_content`: thoughts are given in the open). `include:
["message.output_text.logprobs"]` gives the sampled tokens' logprobs. `strict` of a tool promises nothing: calls are sampled free.

Refused on purpose: tools that run at OpenAI, `truncation: auto`, `background`, `conversation`. A forced
`tool_choice` and a `text.format` are refused in training (constrained.py); where both are given, the answer is the call, has no text to
be formed, and the format is checked and recorded with it.
Test alone: `pytest tests/unit/test_gateway_responses.py`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from agl_ray.gateway.canonical import CallRequest
from agl_ray.gateway.constrained import wish_for_format, wish_for_tool
from agl_ray.gateway.dialects.responses_items import conversation
from agl_ray.gateway.dialects.strict import (
    OnlyValues,
    Strict,
    convert,
    given,
    only,
    read,
    refuse,
    refuse_value,
    shown,
)

NAME = "openai.responses"
LOGPROBS = "message.output_text.logprobs"
_INCLUDES = {
    LOGPROBS,
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "message.input_image.image_url",
}


class Tool(Strict, frozen=True):
    type: str
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Text(Strict, frozen=True):
    format: dict[str, Any] | None = None
    verbosity: str | None = None


class Reasoning(Strict, frozen=True):
    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class StreamOptions(Strict, frozen=True):
    include_obfuscation: bool | None = None


class Body(Strict, frozen=True, kw_only=True):
    """The body of POST /v1/responses."""

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    include: list[str] | None = None
    text: Text | None = None
    reasoning: Reasoning | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_output_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    return_token_ids: bool | None = None
    seed: int | None = None
    parallel_tool_calls: bool | None = None
    # only one value
    truncation: str | None = None
    background: bool | None = None
    top_logprobs: int | None = None
    max_tool_calls: int | None = None
    service_tier: str | None = None
    conversation: Any = None
    prompt: Any = None


_decoder = msgspec.json.Decoder(Body)
_ONLY: OnlyValues = {
    "truncation": (
        lambda v: v == "disabled",
        "a conversation is sent as it is; drop what is too long yourself",
    ),
    "background": (lambda v: v is False, "an answer is given in the call that asks for it"),
    "top_logprobs": (
        lambda v: v == 0,
        f"the engine reports the logprob of the sampled token only; include {LOGPROBS} alone",
    ),
    "max_tool_calls": (lambda v: False, "no tool is called here; leave it out"),
    "service_tier": (lambda v: v in ("auto", "default"), "there is one service tier; leave it out"),
    "conversation": (lambda v: False, "use previous_response_id"),
    "prompt": (lambda v: False, "there are no stored prompts here; use instructions and input"),
}


def parse(body: bytes) -> CallRequest:
    """The canonical request of a responses body; Refusal 400 names the field that is wrong or not supported."""
    asked = read(_decoder, body)
    only(asked, _ONLY)
    _check_text(asked.text)
    if asked.stream_options is not None and not asked.stream:
        refuse("stream_options", "stream_options is only allowed when stream is true")
    if asked.stream_options is not None and asked.stream_options.include_obfuscation:
        refuse("stream_options.include_obfuscation", "include_obfuscation is not supported")
    for name in asked.include or []:
        if name not in _INCLUDES:
            refuse_value(
                "include", f"expected some of {', '.join(sorted(_INCLUDES))}, got {name!r}"
            )
    tools, parse_tools, forced = _tools(asked)
    form = wish_for_format(asked.text.format if asked.text else None, "text.format")
    recorded = given(
        user=asked.user,
        prompt_cache_key=asked.prompt_cache_key,
        safety_identifier=asked.safety_identifier,
        include=asked.include or None,
        reasoning_summary=asked.reasoning.summary if asked.reasoning else None,
        reasoning_generate_summary=asked.reasoning.generate_summary if asked.reasoning else None,
        text_format=asked.text.format if asked.text and forced and form else None,
    )
    previous = asked.previous_response_id
    first = [{"role": "system", "content": asked.instructions}] if asked.instructions else []
    return CallRequest(
        dialect=NAME,
        model=asked.model,
        messages=[*first, *conversation(asked.input, continues=previous is not None)],
        tools=tools,
        parse_tools=parse_tools,
        sampling=given(
            temperature=asked.temperature,
            top_p=asked.top_p,
            max_tokens=asked.max_output_tokens,
            seed=asked.seed,
        ),
        parallel=asked.parallel_tool_calls is not False,
        stream=bool(asked.stream),
        logprobs=LOGPROBS in (asked.include or []),
        return_token_ids=bool(asked.return_token_ids),
        metadata={**(asked.metadata or {}), **recorded},
        template=given(reasoning_effort=asked.reasoning.effort if asked.reasoning else None),
        previous=previous.removeprefix("resp_") if previous is not None else None,
        instructions=bool(first),
        keep=asked.store is not False,
        constraint=forced or form or {},
        echo=_echo(asked),
    )


def _check_text(text: Text | None) -> None:
    if text is None:
        return
    if text.verbosity not in (None, "medium"):
        refuse("text.verbosity", "text.verbosity is not supported; ask for it in the prompt")


def _tools(
    asked: Body,
) -> tuple[list[dict[str, Any]] | None, bool, dict[str, Any] | None]:
    """(tools, whether calls are looked for, the constraint of a forced call)."""
    choice = asked.tool_choice
    made = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(asked.tools or [])]
    if choice in (None, "auto", "none"):
        return made or None, bool(made) and choice != "none", None
    named = choice.get("name") if isinstance(choice, dict) else None
    function = isinstance(choice, dict) and choice.get("type") == "function"
    if choice != "required" and not (function and isinstance(named, str)):
        refuse_value(
            "tool_choice", f"expected auto, none, required or a function, got {shown(choice)}"
        )
    return made, True, wish_for_tool(named, made)


def _tool(given_tool: dict[str, Any], at: str) -> dict[str, Any]:
    """The template's form of a tool, the same as the chat dialect's."""
    if given_tool.get("type") != "function":
        refuse(
            f"{at}.type",
            f"{at}.type: only tools of type 'function' are supported, got {given_tool.get('type')!r}",
        )
    tool = convert(given_tool, Tool, at)
    function = {
        "name": tool.name,
        **given(description=tool.description, parameters=tool.parameters),
    }
    return {"type": "function", "function": function}


def _echo(asked: Body) -> dict[str, Any]:
    """What a response repeats of its request."""
    reasoning = asked.reasoning or Reasoning()
    return {
        "background": False,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "max_tool_calls": None,
        "metadata": asked.metadata or {},
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": asked.previous_response_id,
        "prompt_cache_key": asked.prompt_cache_key,
        "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary},
        "safety_identifier": asked.safety_identifier,
        "service_tier": "default",
        "store": asked.store is not False,
        "temperature": 1.0 if asked.temperature is None else asked.temperature,
        "text": {"format": (asked.text.format if asked.text else None) or {"type": "text"}},
        "tool_choice": asked.tool_choice or "auto",
        "tools": asked.tools or [],
        "top_p": 1.0 if asked.top_p is None else asked.top_p,
        "truncation": "disabled",
        "user": asked.user,
    }
