"""The OpenAI completions dialect, answers: `CallResult` -> response body, pieces of a stream -> SSE chunks.

Called by: `agl_ray/gateway/http.py`. As in the chat dialect, `return_token_ids` adds `token_ids`, `prompt_token_ids` and
`weight_versions`, here all to the choice, as vLLM has them. Test alone: `pytest tests/unit/test_gateway_completions.py`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from agl_ray.gateway.canonical import CallRequest, CallResult, Refusal, Streamed
from agl_ray.gateway.dialects.chat_answer import sse, usage


def response_body(request: CallRequest, result: CallResult, tokens: list[str] | None) -> bytes:
    """The JSON body of a non-streaming answer. `tokens` (T strings) are needed where the request asks for logprobs."""
    choice = _choice(result.content or "", result.finish_reason)
    if tokens is not None:
        choice["logprobs"] = _logprobs(list(zip(tokens, result.logprobs, strict=True)), 0)
    if request.return_token_ids:
        choice["prompt_token_ids"] = result.prompt_ids
        choice["token_ids"] = result.response_ids
        choice["weight_versions"] = result.weight_versions
    head = _head(request, result.call_id, result.created)
    return msgspec.json.encode({**head, "choices": [choice], "usage": usage(result)})


class ChunkWriter:
    """The SSE events of one streamed completion: chunks of one choice each. Logprobs and ids of tokens whose text is still held back
    go with the next event."""

    def __init__(self, request: CallRequest, first: Streamed) -> None:
        self._request = request
        self._prompt_ids: list[int] | None = first.prompt_ids
        self._head = _head(request, first.call_id, first.created)
        self._ids: list[int] = []
        self._tokens: list[tuple[str, float]] = []
        self._length = 0  # characters of the tokens that were sent

    def begin(self) -> list[bytes]:
        return []

    def piece(self, piece: Streamed) -> list[bytes]:
        self._ids += piece.token_ids
        self._tokens += piece.tokens
        return [self._chunk(piece.text, None)] if piece.text else []

    def end(self, result: CallResult) -> list[bytes]:
        events = [self._chunk("", result.finish_reason)]
        if self._request.include_usage:
            events.append(sse({**self._head, "choices": [], "usage": usage(result)}))
        events.append(b"data: [DONE]\n\n")
        return events

    def error(self, refusal: Refusal) -> bytes:
        return b"data: " + refusal.body() + b"\n\n"

    def _chunk(self, text: str, finish: str | None) -> bytes:
        choice = _choice(text, finish)
        if self._request.logprobs:
            choice["logprobs"] = _logprobs(self._tokens, self._length)
            self._length += sum(len(token) for token, _ in self._tokens)
            self._tokens = []
        if self._request.return_token_ids:
            choice["token_ids"] = self._ids
            self._ids = []
            if self._prompt_ids is not None:
                choice["prompt_token_ids"] = self._prompt_ids
                self._prompt_ids = None
        return sse({**self._head, "choices": [choice], "usage": None})


def _head(request: CallRequest, call_id: str, created: int) -> dict[str, Any]:
    kind = {"id": f"cmpl-{call_id}", "object": "text_completion"}
    return {**kind, "created": created, "model": request.model}


def _choice(text: str, finish: str | None) -> dict[str, Any]:
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}


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
