"""What every dialect is turned into and answered from: one model call, free of any API's field names.

Called by: the dialects (`dialects/chat.py` parses into `CallRequest`, writes from `CallResult`) and the door. `Refusal` is
how any layer of the gateway says no: an HTTP status and the error body of OpenAI's API. Test alone: nothing to run, the
dialects' and the door's tests use all of it.
"""

from __future__ import annotations

from typing import Any

import msgspec

from agl_ray.types import AglError

SAMPLING_KEYS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "max_tokens",
    "stop",
    "seed",
)
"""Names of the sampling parameters: of a request, of an LLM resource, of a rollout's `metadata["sampling"]`."""


class Refusal(AglError):
    """The gateway does not answer this call. `status` is the HTTP status; the rest is OpenAI's error body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.kind = (
            status,
            message,
            param,
            code,
            kind,
        )

    def body(self) -> bytes:
        """The JSON body: {"error": {message, type, param, code}}."""
        error = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return msgspec.json.encode({"error": error})


class CallRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One model call as the caller asked for it."""

    model: str
    messages: list[dict[str, Any]]
    """In the form that chat templates take: `content` is a string, arguments of tool calls are JSON values where they parse."""
    tools: list[dict[str, Any]] | None = None
    parse_tools: bool = False
    """Tool calls are looked for in the answer (tools were given and not forbidden)."""
    sampling: dict[str, Any] = {}
    """Only what the caller gave; keys of SAMPLING_KEYS."""
    stream: bool = False
    include_usage: bool = False
    logprobs: bool = False
    return_token_ids: bool = False
    metadata: dict[str, Any] = {}
    """The caller's `metadata` and `user`, recorded with the call."""


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A function call found in the answer; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


class CallResult(msgspec.Struct, frozen=True, kw_only=True):
    """One answer. `response_ids` (T) and `logprobs` (T) are the engine's; `content` and `tool_calls` are what the caller sees."""

    call_id: str
    created: int
    """Seconds since the epoch."""
    content: str | None
    tool_calls: list[ToolCall]
    finish_reason: str
    """stop | length"""
    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float]
    weight_versions: list[tuple[int, int]]
    cached_tokens: int = 0

    def message(self) -> dict[str, Any]:
        """The assistant message as returned, in the chat dialect's form."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.tool_calls
            ]
        return message
