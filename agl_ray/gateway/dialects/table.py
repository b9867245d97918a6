"""The dialects that the gateway speaks: one entry each, and what an entry has to offer.

Called by: `agl_ray/gateway/http.py`. A further dialect is a module that reads requests, one that writes answers, and one more entry
in DIALECTS. Test alone: `pytest tests/unit/test_gateway_http.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from agl_ray.gateway.canonical import CallRequest, CallResult, Refusal, Streamed
from agl_ray.gateway.dialects import (
    chat,
    chat_answer,
    completions,
    completions_answer,
    messages,
    messages_answer,
    responses,
    responses_answer,
    responses_stream,
)

Tokens = list[str] | None


class StreamWriter(Protocol):
    """The server-sent events of one streamed answer, as bytes: `piece` for each piece after the first, then either `end` or `error`.
    `begin` comes before the first of them that has something to show, so that what fails before has its own status."""

    def __init__(self, request: CallRequest, first: Streamed) -> None: ...

    def begin(self) -> list[bytes]: ...

    def piece(self, piece: Streamed) -> list[bytes]: ...

    def end(self, result: CallResult) -> list[bytes]: ...

    def error(self, refusal: Refusal) -> bytes: ...


@dataclass(frozen=True)
class Dialect:
    """`name` is recorded with each call. `whole(request, results, tokens)` is the body of the N answers that are not streamed; `tokens`
    are the texts of each one's T tokens where the request asks for logprobs."""

    name: str
    parse: Callable[[bytes], CallRequest]
    whole: Callable[[CallRequest, list[CallResult], list[Tokens]], bytes]
    stream: type[StreamWriter]
    error: Callable[[Refusal], bytes]


def _one(
    write: Callable[[CallRequest, CallResult, Tokens], bytes],
) -> Callable[[CallRequest, list[CallResult], list[Tokens]], bytes]:
    """The `whole` of a dialect that has no `n`."""

    def whole(request: CallRequest, results: list[CallResult], tokens: list[Tokens]) -> bytes:
        return write(request, results[0], tokens[0])

    return whole


CHAT = Dialect(
    chat.NAME, chat.parse, chat_answer.response_body, chat_answer.ChunkWriter, Refusal.body
)
COMPLETIONS = Dialect(
    completions.NAME,
    completions.parse,
    completions_answer.response_body,
    completions_answer.ChunkWriter,
    Refusal.body,
)
RESPONSES = Dialect(
    responses.NAME,
    responses.parse,
    _one(responses_answer.response_body),
    responses_stream.EventWriter,
    Refusal.body,
)
MESSAGES = Dialect(
    messages.NAME,
    messages.parse,
    _one(messages_answer.response_body),
    messages_answer.EventWriter,
    messages_answer.error_body,
)

DIALECTS = {
    "v1/chat/completions": CHAT,
    "v1/completions": COMPLETIONS,
    "v1/responses": RESPONSES,
    "v1/messages": MESSAGES,
}
"""What stands behind the attempt (and role) in the URL of a POST -> the dialect."""
