"""The OpenAI completions dialect, answers: `CallResult` -> response body, pieces of a stream -> SSE chunks.

Called by: `agl_ray/gateway/http.py`. As in the chat dialect, `return_token_ids` adds `token_ids`, `prompt_token_ids` and
`weight_versions`, here all to the choice, as vLLM has them. Test alone: `pytest tests/unit/test_gateway_completions.py`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from agl_ray.gateway.canonical import CallRequest, CallResult, Refusal, Streamed
from agl_ray.gateway.dialects.chat_answer import sse, usage


def response_body(
    request: CallRequest, results: list[CallResult], tokens: list[list[str] | None]
) -> bytes:
    """The JSON body of N answers that are not streamed. `tokens` (T strings each) are needed where the request asks for logprobs."""
    choices = [_whole(request, *both) for both in zip(results, tokens, strict=True)]
    head = _head(request, results[0].call_id, results[0].created)
    return msgspec.json.encode({**head, "choices": choices, "usage": usage(*results)})


def _whole(request: CallRequest, result: CallResult, tokens: list[str] | None) -> dict[str, Any]:
    """The choice of one answer."""
    choice = _choice(result.index, result.content or "", result.finish_reason)
    if tokens is not None:
        choice["logprobs"] = _logprobs(list(zip(tokens, result.logprobs, strict=True)), 0)
    if request.return_token_ids:
        choice["prompt_token_ids"] = result.prompt_ids
        choice["token_ids"] = result.response_ids
        choice["weight_versions"] = result.weight_versions
    if request.n > 1:
        choice["call_id"] = result.call_id
    return choice


class _Held:
    """What one choice of a stream has not sent yet."""

    def __init__(self, first: Streamed) -> None:
        self.call_id = first.call_id
        self.prompt_ids: list[int] | None = first.prompt_ids
        self.ids: list[int] = []
        self.tokens: list[tuple[str, float]] = []
        self.length = 0  # characters of the tokens that were sent


class ChunkWriter:
    """The SSE events of streamed completions: chunks of one choice each. Logprobs and ids of tokens whose text is still held back
    go with the choice's next event."""

    def __init__(self, request: CallRequest, first: Streamed) -> None:
        self._request = request
        self._head = _head(request, first.call_id, first.created)
        self._held = {first.index: _Held(first)}
        self._done: list[CallResult] = []

    def begin(self) -> list[bytes]:
        return []

    def piece(self, piece: Streamed) -> list[bytes]:
        held = self._held.setdefault(piece.index, _Held(piece))
        held.ids += piece.token_ids
        held.tokens += piece.tokens
        return [self._chunk(piece.index, piece.text, None)] if piece.text else []

    def end(self, result: CallResult) -> list[bytes]:
        events = [self._chunk(result.index, "", result.finish_reason)]
        self._done.append(result)
        if len(self._done) < self._request.n:
            return events
        if self._request.include_usage:
            events.append(sse({**self._head, "choices": [], "usage": usage(*self._done)}))
        events.append(b"data: [DONE]\n\n")
        return events

    def error(self, refusal: Refusal) -> bytes:
        return b"data: " + refusal.body() + b"\n\n"

    def _chunk(self, index: int, text: str, finish: str | None) -> bytes:
        choice, held = _choice(index, text, finish), self._held[index]
        if self._request.logprobs:
            choice["logprobs"] = _logprobs(held.tokens, held.length)
            held.length += sum(len(token) for token, _ in held.tokens)
            held.tokens = []
        if self._request.return_token_ids:
            choice["token_ids"] = held.ids
            held.ids = []
            if held.prompt_ids is not None:
                choice["prompt_token_ids"] = held.prompt_ids
                held.prompt_ids = None
        if self._request.n > 1:
            choice["call_id"] = held.call_id
        return sse({**self._head, "choices": [choice], "usage": None})


def _head(request: CallRequest, call_id: str, created: int) -> dict[str, Any]:
    kind = {"id": f"cmpl-{call_id}", "object": "text_completion"}
    return {**kind, "created": created, "model": request.model}


def _choice(index: int, text: str, finish: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}


def _logprobs(tokens: list[tuple[str, float]], offset: int) -> dict[str, Any]:
    """`text_offset` counts the characters of the tokens before."""
    offsets = []
    for token, _ in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": [token for token, _ in tokens],
        "token_logprobs": [logprob for _, logprob in tokens],
        "top_logprobs": None,
        "text_offset": offsets,
    }
