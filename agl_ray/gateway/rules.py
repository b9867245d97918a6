"""What a call must be like before it is planned: its model, its tools, the options of its template, its room in the context.

Called by: the door. Each rule answers with a Refusal that names the field and what to do. Test alone:
`pytest tests/unit/test_gateway_door.py`.
"""

from __future__ import annotations

from typing import Any

from agl_ray.gateway.canonical import CallRequest, Refusal
from agl_ray.gateway.render import Renderer
from agl_ray.gateway.session import Plan

OVERLONG = "context_length_exceeded"
THINKING = "enable_thinking"  # the switch of Qwen's, GLM's and others' templates


def check_request(request: CallRequest, model: str, renderer: Renderer) -> None:
    """Refusal where the call asks for another model, or for what this model's parsers and tokenizer cannot do."""
    if request.model != model:
        raise Refusal(
            404,
            f"model: expected {model!r}, got {request.model!r}",
            param="model",
            code="model_not_found",
        )
    if request.tools and not renderer.parses_tools:
        raise Refusal(
            400,
            "tools: this run has no tool-call parser; set engine.tool_parser (hermes for Qwen)",
            param="tools",
            code="unsupported_parameter",
        )
    if request.tools:
        renderer.check_tools(request.tools)
    if isinstance(request.prompt, list):
        wrong = [token for token in request.prompt if not 0 <= token < renderer.num_ids]
        if wrong:
            raise Refusal(
                400,
                f"prompt: expected token ids from 0 to {renderer.num_ids - 1}, got {wrong[0]}",
                param="prompt",
                code="invalid_value",
            )


def template_options(request: CallRequest, renderer: Renderer) -> dict[str, Any]:
    """The options that the chat template gets; Refusal for one that it does not know."""
    for option in request.template:
        if not renderer.knows(option):
            raise Refusal(
                400,
                f"{option}: this model's chat template has no such option; leave it out",
                param=option,
                code="unsupported_parameter",
            )
    if request.thinking is None:
        return request.template
    if renderer.knows(THINKING):
        return {**request.template, THINKING: request.thinking}
    if request.thinking or renderer.thoughts is not None:
        raise Refusal(
            400,
            f"thinking: it cannot be switched {'on' if request.thinking else 'off'}, since this model's chat template has no "
            f"option {THINKING}; leave it out",
            param="thinking",
            code="unsupported_parameter",
        )
    return request.template  # a model that does not think is asked not to


def room(longest: int, request: CallRequest, plan: Plan, wanted: int | None) -> int:
    """Response tokens: what was asked for, or as many as the context holds; Refusal where the prompt fills it."""
    num_prompt = len(plan.prompt_ids)
    left = longest - num_prompt
    if left < 1:
        what = "messages" if request.prompt is None else "prompt"
        raise Refusal(
            400,
            f"This model's maximum context length is {longest} tokens. However, your {what} resulted in "
            f"{num_prompt} tokens. Please reduce the length of the {what}.",
            param=what,
            code=OVERLONG,
        )
    return left if wanted is None else min(wanted, left)
