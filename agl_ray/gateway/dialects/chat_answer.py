"""The OpenAI chat completions dialect, answers: `CallResult` -> response body, pieces of a stream -> SSE chunks.

Called by: `agl_ray/gateway/http.py`. Beside OpenAI's fields, `return_token_ids` adds `prompt_token_ids`, and to a choice `token_ids`
and `weight_versions` ([[first token, version], ...]). Test alone: `pytest tests/unit/test_gateway_chat.py`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from agl_ray.gateway.canonical import CallRequest, CallResult, Refusal, Streamed


def finish_reason(result: CallResult) -> str:
    return (
        "tool_calls"
        if result.tool_calls and result.finish_reason == "stop"
        else result.finish_reason
    )


def usage(*results: CallResult) -> dict[str, Any]:
    """Of one answer, or of all answers to one prompt: the prompt counts once."""
    prompt = results[0].num_prompt
    response = sum(result.num_response for result in results)
    made = {
        "prompt_tokens": prompt,
        "completion_tokens": response,
        "total_tokens": prompt + response,
        "prompt_tokens_details": {"cached_tokens": results[0].cached_tokens},
    }
    if thoughts := sum(result.reasoning_tokens for result in results):
        made["completion_tokens_details"] = {"reasoning_tokens": thoughts}
    return made


def message(result: CallResult) -> dict[str, Any]:
    """The assistant message; its thoughts are under both of the names that clients look for."""
    made = result.message()
    if result.reasoning is not None:
        made["reasoning"] = result.reasoning
    return made


def logprob_entry(token: str, logprob: float) -> dict[str, Any]:
    """One token of `logprobs.content`; `bytes` is null where the token is part of a character."""
    cut = "\ufffd" in token
    return {
        "token": token,
        "logprob": logprob,
        "bytes": None if cut else list(token.encode()),
        "top_logprobs": [],
    }


def response_body(
    request: CallRequest, results: list[CallResult], tokens: list[list[str] | None]
) -> bytes:
    """The JSON body of N answers that are not streamed. `tokens` (T strings each) are needed where the request asks for logprobs."""
    first = results[0]
    body: dict[str, Any] = {
        "id": f"chatcmpl-{first.call_id}",
        "object": "chat.completion",
        "created": first.created,
        "model": request.model,
        "choices": [_choice(request, *both) for both in zip(results, tokens, strict=True)],
        "usage": usage(*results),
    }
    if request.return_token_ids:
        body["prompt_token_ids"] = first.prompt_ids
    return msgspec.json.encode(body)


def _choice(request: CallRequest, result: CallResult, tokens: list[str] | None) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": result.index,
        "message": message(result),
        "finish_reason": finish_reason(result),
        "logprobs": None,
    }
    if tokens is not None:
        pairs = zip(tokens, result.logprobs, strict=True)
        choice["logprobs"] = {"content": [logprob_entry(*pair) for pair in pairs]}
    if request.return_token_ids:
        choice["token_ids"] = result.response_ids
        choice["weight_versions"] = result.weight_versions
    if request.n > 1:
        choice["call_id"] = result.call_id
    return choice


class _Held:
    """What one choice of a stream has not sent yet."""

    def __init__(self, call_id: str) -> None:
        self.call_id = call_id
        self.first = True
        self.ids: list[int] = []
        self.logprobs: list[dict[str, Any]] = []


class ChunkWriter:
    """The SSE events of streamed answers: chunks of one choice each.

    Logprobs and token ids of tokens whose text is still held back go with the choice's next event.
    """

    def __init__(self, request: CallRequest, first: Streamed) -> None:
        self._request = request
        self._prompt_ids = first.prompt_ids
        self._head = {
            "id": f"chatcmpl-{first.call_id}",
            "object": "chat.completion.chunk",
            "created": first.created,
            "model": request.model,
        }
        self._held = {first.index: _Held(first.call_id)}
        self._done: list[CallResult] = []

    def begin(self) -> list[bytes]:
        return []

    def piece(self, piece: Streamed) -> list[bytes]:
        held = self._held.setdefault(piece.index, _Held(piece.call_id))
        held.ids += piece.token_ids
        held.logprobs += [logprob_entry(*pair) for pair in piece.tokens]
        delta: dict[str, Any] = {}
        if piece.reasoning:
            delta |= {"reasoning_content": piece.reasoning, "reasoning": piece.reasoning}
        if piece.text:
            delta["content"] = piece.text
        return [self._delta(piece.index, delta)] if delta else []

    def _delta(self, index: int, delta: dict[str, Any], finish: str | None = None) -> bytes:
        """One event with one choice."""
        held = self._held[index]
        if held.first:
            delta = {"role": "assistant", "content": delta.get("content", ""), **delta}
        choice: dict[str, Any] = {
            "index": index,
            "delta": delta,
            "finish_reason": finish,
            "logprobs": None,
        }
        event = {**self._head, "choices": [choice]}
        if self._request.logprobs:
            choice["logprobs"] = {"content": held.logprobs}
            held.logprobs = []
        if self._request.return_token_ids:
            choice["token_ids"] = held.ids
            held.ids = []
            if held.first:
                event["prompt_token_ids"] = self._prompt_ids
        if self._request.include_usage:
            event["usage"] = None
        if self._request.n > 1:
            choice["call_id"] = held.call_id
        held.first = False
        return sse(event)

    def end(self, result: CallResult) -> list[bytes]:
        """Tool calls, finish reason, usage where asked for, [DONE]."""
        events = [
            self._delta(result.index, {"tool_calls": [{"index": number, **call}]})
            for number, call in enumerate(result.message().get("tool_calls", []))
        ]
        events.append(self._delta(result.index, {}, finish_reason(result)))
        self._done.append(result)
        if len(self._done) < self._request.n:
            return events
        if self._request.include_usage:
            events.append(sse({**self._head, "choices": [], "usage": usage(*self._done)}))
        events.append(b"data: [DONE]\n\n")
        return events

    def error(self, refusal: Refusal) -> bytes:
        """An event that OpenAI's clients raise."""
        return b"data: " + refusal.body() + b"\n\n"


def sse(event: Any) -> bytes:
    return b"data: " + msgspec.json.encode(event) + b"\n\n"


def models_body(model: str) -> bytes:
    """The answer to GET /v1/models, for OpenAI's clients and for Anthropic's."""
    entry = {"id": model, "object": "model", "created": 0, "owned_by": "agl-ray"}
    entry |= {"type": "model", "display_name": model, "created_at": "1970-01-01T00:00:00Z"}
    page = {"has_more": False, "first_id": model, "last_id": model}
    return msgspec.json.encode({"object": "list", "data": [entry], **page})
