"""The Anthropic messages dialect, answers: `CallResult` -> message body, pieces of a stream -> Anthropic's events, Refusal -> error.

Called by: `agl_ray/gateway/http.py`. `input_tokens` are those that the prefix cache did not have, as Anthropic counts them. The
signature of a thinking block is the call's id. Beside Anthropic's fields, `return_token_ids` adds `prompt_token_ids`, `token_ids`,
`logprobs` (of the sampled tokens) and `weight_versions` ([[first token, version], ...]), in a stream to the message of `message_delta`'s
event. Test alone: `pytest tests/unit/test_gateway_messages.py`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from agl_ray.gateway.canonical import CallRequest, CallResult, Refusal, Streamed, json_object
from agl_ray.gateway.dialects.messages import NO_THREADS

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
}


def error_body(refusal: Refusal) -> bytes:
    """Anthropic's error body: {"type": "error", "error": {type, message}}; to a call with a thread also what its client goes by."""
    other = "api_error" if refusal.status >= 500 else "invalid_request_error"
    kind = _KINDS.get(refusal.status, other)
    error: dict[str, Any] = {"type": kind, "message": refusal.message}
    if refusal.code == NO_THREADS:
        error["details"] = {"error_code": NO_THREADS, "unsupported": [refusal.param]}
    return msgspec.json.encode({"type": "error", "error": error})


def stop_reason(result: CallResult) -> str:
    if result.finish_reason == "length":
        return "max_tokens"
    if result.tool_calls:
        return "tool_use"
    return "end_turn" if result.stop_string is None else "stop_sequence"


def usage(result: CallResult) -> dict[str, Any]:
    made: dict[str, Any] = {
        "input_tokens": result.num_prompt - result.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": result.cached_tokens,
        "output_tokens": result.num_response,
    }
    if result.reasoning_tokens:
        made["output_tokens_details"] = {"thinking_tokens": result.reasoning_tokens}
    return made


def response_body(request: CallRequest, result: CallResult, tokens: list[str] | None) -> bytes:
    """The JSON body of a non-streaming answer."""
    body = {
        **_message(request, result.call_id),
        "content": _blocks(result),
        "stop_reason": stop_reason(result),
        "stop_sequence": result.stop_string,
        "usage": usage(result),
        **_extra(request, result),
    }
    return msgspec.json.encode(body)


def _message(request: CallRequest, call_id: str) -> dict[str, Any]:
    head = {"id": f"msg_{call_id}", "type": "message", "role": "assistant", "model": request.model}
    return {**head, "content": [], "stop_reason": None, "stop_sequence": None}


def _blocks(result: CallResult) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if result.reasoning is not None:
        blocks.append(
            {"type": "thinking", "thinking": result.reasoning, "signature": result.call_id}
        )
    if result.content:
        blocks.append({"type": "text", "text": result.content})
    for call in result.tool_calls:
        given = json_object(call.arguments)
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": given})
    return blocks


def _extra(request: CallRequest, result: CallResult) -> dict[str, Any]:
    if not request.return_token_ids:
        return {}
    return {
        "prompt_token_ids": result.prompt_ids,
        "token_ids": result.response_ids,
        "logprobs": result.logprobs,
        "weight_versions": result.weight_versions,
    }


class EventWriter:
    """The events of one streamed message. Blocks come in the order thinking, text, tool_use; each is closed when the next begins."""

    def __init__(self, request: CallRequest, first: Streamed) -> None:
        self._request, self._first = request, first
        self._index = -1
        self._open: str | None = None  # type of the block that is open

    def begin(self) -> list[bytes]:
        message = {
            **_message(self._request, self._first.call_id),
            "usage": {"input_tokens": len(self._first.prompt_ids), "output_tokens": 0},
        }
        return [event("message_start", message=message), event("ping")]

    def piece(self, piece: Streamed) -> list[bytes]:
        events: list[bytes] = []
        if piece.reasoning:
            events += self._enter("thinking", {"thinking": "", "signature": ""})
            events.append(self._delta("thinking_delta", thinking=piece.reasoning))
        if piece.text:
            events += self._enter("text", {"text": ""})
            events.append(self._delta("text_delta", text=piece.text))
        return events

    def end(self, result: CallResult) -> list[bytes]:
        events: list[bytes] = []
        for call in result.tool_calls:
            block = {"id": call.id, "name": call.name, "input": {}}
            events += self._enter("tool_use", block)
            events.append(self._delta("input_json_delta", partial_json=call.arguments))
        events += self._leave()
        delta = {"stop_reason": stop_reason(result), "stop_sequence": result.stop_string}
        extra = _extra(self._request, result)
        events.append(event("message_delta", delta=delta, usage=usage(result), **extra))
        events.append(event("message_stop"))
        return events

    def error(self, refusal: Refusal) -> bytes:
        return b"event: error\ndata: " + error_body(refusal) + b"\n\n"

    def _enter(self, kind: str, block: dict[str, Any]) -> list[bytes]:
        """Go on in the open block, or close it and open one of this kind; each tool call has a block of its own."""
        if self._open == kind and kind != "tool_use":
            return []
        events = self._leave()
        self._index, self._open = self._index + 1, kind
        start = {"type": kind, **block}
        events.append(event("content_block_start", index=self._index, content_block=start))
        return events

    def _leave(self) -> list[bytes]:
        if self._open is None:
            return []
        events = []
        if self._open == "thinking":
            events.append(self._delta("signature_delta", signature=self._first.call_id))
        self._open = None
        events.append(event("content_block_stop", index=self._index))
        return events

    def _delta(self, kind: str, **fields: Any) -> bytes:
        return event("content_block_delta", index=self._index, delta={"type": kind, **fields})


def event(kind: str, **fields: Any) -> bytes:
    """A server-sent event with its name, and its name again in the data."""
    data = msgspec.json.encode({"type": kind, **fields})
    return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"
