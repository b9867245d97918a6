"""Answers that must have a form: JSON, JSON of a schema, a tool call. vLLM's structured output sees to it, token by token.

Such an answer is not sampled from the model's own distribution: tokens that the form forbids have probability 0, the others the more.
Its logprobs are those of the distribution that was sampled from, which the learner does not compute. So in a training rollout it is
refused, unless the run (`gateway.allow_constrained`) or the rollout (`allow_constrained` in its metadata, which goes first) allows it;
and every such call's span has the attribute `agl.constrained` (json | json_object | tool), by which training leaves its tokens out: they
are context, `calls_constrained` and `tokens_dropped_constrained` among a step's metrics count them. Elsewhere it is simply done.

Called by: the dialects (the functions that read a wish), the door (`allowed`, `structure`). Test alone:
`pytest tests/unit/test_gateway_constrained.py`.
"""

from __future__ import annotations

from typing import Any

from agl_ray.gateway.canonical import CallRequest, Refusal
from agl_ray.gateway.render import Renderer
from agl_ray.types import Rollout

ALLOW = "allow_constrained"
_FIELDS = {
    "openai.chat": "response_format",
    "openai.responses": "text.format",
    "anthropic.messages": "output_config.format",
}


def wish_for_format(given: dict[str, Any] | None, param: str) -> dict[str, Any] | None:
    """The constraint of a `response_format` (chat: the schema is in `json_schema`), `text.format` or `output_config.format` (the schema
    is beside the type). None: any text."""
    kind = None if given is None else given.get("type")
    if given is None or kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    inner = given.get("json_schema", given) if kind == "json_schema" else None
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if not isinstance(schema, dict):
        raise Refusal(
            400,
            f"{param}: expected the type text, json_object or json_schema with a schema, got {given!r}",
            param=param,
            code="invalid_value",
        )
    return {"json": schema}


def wish_for_tool(name: str | None, tools: list[dict[str, Any]] | None) -> dict[str, Any]:
    """The constraint that the answer is a call, of this tool or of any; Refusal where there is no such tool."""
    names = [tool["function"]["name"] for tool in tools or []]
    if not names or (name is not None and name not in names):
        raise Refusal(
            400,
            f"tool_choice: expected one of the tools {names}, got {'any' if name is None else repr(name)}",
            param="tool_choice",
            code="invalid_value",
        )
    return {"tool": name}


def kind(request: CallRequest) -> str | None:
    """json | json_object | tool, or None where the answer is free."""
    return next(iter(request.constraint), None)


def allowed(request: CallRequest, rollout: Rollout, by_default: bool) -> None:
    """Refusal for a constrained call of a training rollout that does not allow it; `by_default` of one that says nothing of it."""
    if kind(request) is None or rollout.mode != "train":
        return
    if rollout.metadata.get(ALLOW, by_default) is True:
        return
    raise Refusal(
        400,
        f"an answer that must have a form ({kind(request)}) is refused in a training rollout: it bends the distribution that answers "
        f"are sampled from, so its logprobs are not the policy's; ask for the form in the prompt, use it in validation only, or set "
        f"gateway.{ALLOW}: true (for one rollout: {ALLOW} in its metadata), which leaves such answers out of training",
        param="tool_choice" if kind(request) == "tool" else _FIELDS.get(request.dialect),
        code="constrained_in_training",
    )


def structure(request: CallRequest, renderer: Renderer) -> dict[str, Any] | None:
    """What the engine is to be told; Refusal where this model's tool parser names no form of a call."""
    if kind(request) != "tool":
        return request.constraint or None
    tag = renderer.call_form(
        request.tools or [], request.constraint["tool"], parallel=request.parallel
    )
    if tag is None:
        raise Refusal(
            400,
            "tool_choice: a call cannot be forced here, since vLLM names no form for the calls of engine.tool_parser; use auto",
            param="tool_choice",
            code="unsupported_parameter",
        )
    return {"structural_tag": tag}
