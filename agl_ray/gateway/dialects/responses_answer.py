"""The OpenAI responses dialect, answers: `CallResult` -> response object. The events of a stream are in responses_stream.py.

Called by: `agl_ray/gateway/http.py`. Ids are made of the call's: `resp_<call>`, `rs_<call>` (thoughts), `msg_<call>`,
`fc_<call>_<number>`. Beside OpenAI's fields, `return_token_ids` adds `prompt_token_ids`, `token_ids` and `weight_versions` to the
response. Test alone: `pytest tests/unit/test_gateway_responses.py`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from agl_ray.gateway.canonical import CallRequest, CallResult, ToolCall
from agl_ray.gateway.dialects.chat_answer import logprob_entry


def response_body(request: CallRequest, result: CallResult, tokens: list[str] | None) -> bytes:
    """The JSON body of a non-streaming answer. `tokens` (T strings) are needed where the request asks for logprobs."""
    return msgspec.json.encode(finished(request, result, tokens))


def finished(request: CallRequest, result: CallResult, tokens: list[str] | None) -> dict[str, Any]:
    """The response object of an answer that is whole."""
    logprobs = []
    if tokens is not None:
        pairs = zip(tokens, result.logprobs, strict=True)
        logprobs = [logprob_entry(*pair) for pair in pairs]
    cut = result.finish_reason == "length"
    made = {
        **response(request, result.call_id, result.created),
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": output(result, logprobs),
        "usage": usage(result),
    }
    if request.return_token_ids:
        made["prompt_token_ids"] = result.prompt_ids
        made["token_ids"] = result.response_ids
        made["weight_versions"] = result.weight_versions
    return made


def response(request: CallRequest, call_id: str, created: int) -> dict[str, Any]:
    """The response object before anything was said."""
    return {
        "id": f"resp_{call_id}",
        "object": "response",
        "created_at": created,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "model": request.model,
        "output": [],
        "usage": None,
        **request.echo,
    }


def output(result: CallResult, logprobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output items: thoughts, message, function calls."""
    status = "incomplete" if result.finish_reason == "length" else "completed"
    items: list[dict[str, Any]] = []
    if result.reasoning is not None:
        items.append(reasoning_item(result.call_id, result.reasoning, status))
    if result.content or (not items and not result.tool_calls):
        items.append(message_item(result.call_id, result.content or "", logprobs, status))
    items += [
        call_item(result.call_id, number, call, call.arguments, status)
        for number, call in enumerate(result.tool_calls)
    ]
    return items


def usage(result: CallResult) -> dict[str, Any]:
    prompt, answer = result.num_prompt, result.num_response
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": result.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": answer,
        "output_tokens_details": {"reasoning_tokens": result.reasoning_tokens},
        "total_tokens": prompt + answer,
    }


def reasoning_item(call_id: str, text: str | None, status: str) -> dict[str, Any]:
    """text: None before it is known."""
    content = [] if text is None else [{"type": "reasoning_text", "text": text}]
    return {
        "id": f"rs_{call_id}",
        "type": "reasoning",
        "summary": [],
        "content": content,
        "encrypted_content": None,
        "status": status,
    }


def message_item(
    call_id: str, text: str | None, logprobs: list[dict[str, Any]], status: str
) -> dict[str, Any]:
    """text: None before it is known."""
    return {
        "id": f"msg_{call_id}",
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [] if text is None else [text_part(text, logprobs)],
    }


def text_part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def call_item(
    call_id: str, number: int, call: ToolCall, arguments: str, status: str
) -> dict[str, Any]:
    return {
        "id": f"fc_{call_id}_{number}",
        "type": "function_call",
        "call_id": call.id,
        "name": call.name,
        "arguments": arguments,
        "status": status,
    }
