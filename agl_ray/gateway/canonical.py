"""What every dialect is turned into and answered from: one model call, free of any API's field names.

Called by: the dialects (they parse into `CallRequest` and write from `Streamed` and `CallResult`) and the door. `Refusal` is how
any layer of the gateway says no: an HTTP status and what the dialect's error body needs. Test alone: nothing to run, the dialects'
and the door's tests use all of it.
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
    """The gateway does not answer this call. `status` is the HTTP status; `param` is a place in the request's body, `code` and
    `kind` are words of OpenAI's API."""

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
        """OpenAI's error body: {"error": {message, type, param, code}}."""
        return msgspec.json.encode({"error": self.fields()})

    def fields(self) -> dict[str, str | None]:
        return {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }


class CallRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One model call as the caller asked for it."""

    model: str
    messages: list[dict[str, Any]]
    """In the form that chat templates take: `content` is a string, arguments of tool calls are JSON values where they parse,
    thoughts of an earlier answer are in `reasoning_content`. Empty where `prompt` is given."""
    dialect: str = "openai.chat"
    """The API it was asked in, as the call's span records it."""
    prompt: str | list[int] | None = None
    """A raw prompt, text or ids, in the place of a conversation."""
    tools: list[dict[str, Any]] | None = None
    parse_tools: bool = False
    """Tool calls are looked for in the answer (tools were given and not forbidden)."""
    sampling: dict[str, Any] = {}
    """Only what the caller gave; keys of SAMPLING_KEYS."""
    n: int = 1
    """Answers to give, each a call of its own (many.py)."""
    parallel: bool = True
    """The answer may hold several tool calls; else its first one is all that the caller sees."""
    stream: bool = False
    include_usage: bool = False
    logprobs: bool = False
    return_token_ids: bool = False
    metadata: dict[str, Any] = {}
    """The caller's `metadata` and `user`, recorded with the call."""
    template: dict[str, Any] = {}
    """Options for the chat template; refused where it does not know them."""
    thinking: bool | None = None
    """Whether the model is to think before it answers; None: as its template has it."""
    previous: str | None = None
    """The id of an earlier answer of this attempt and role whose conversation `messages` goes on."""
    instructions: bool = False
    """The first message is for this call only: it is no part of a conversation that goes on from here."""
    keep: bool = False
    """A later call may name this one as `previous`."""
    constraint: dict[str, Any] = {}
    """The form that the answer must have, at most one: {"json": schema} | {"json_object": True} | {"tool": name or None}."""
    echo: dict[str, Any] = {}
    """What the dialect's answer repeats of the request, in the dialect's own form."""


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A function call found in the answer; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


class CallResult(msgspec.Struct, frozen=True, kw_only=True):
    """One answer. `response_ids` (T) and `logprobs` (T) are the engine's; `reasoning`, `content` and `tool_calls` are what the
    caller sees."""

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
    reasoning: str | None = None
    """The model's thoughts, where the run has a reasoning parser and it found any."""
    reasoning_tokens: int = 0
    stop_string: str | None = None
    """The stop string that ended it."""
    index: int = 0
    """Which of a request's answers it is."""
    used: tuple[int, int] | None = None
    """Tokens of prompt and response as an outside endpoint counted them: its answers have no ids. None: the ids are all there is."""

    @property
    def num_prompt(self) -> int:
        return self.used[0] if self.used else len(self.prompt_ids)

    @property
    def num_response(self) -> int:
        return self.used[1] if self.used else len(self.response_ids)

    def message(self) -> dict[str, Any]:
        """The assistant message as returned, in the chat dialect's form."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
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


class Streamed(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a streamed answer: text that has become certain. The first one has the call's id, its time in seconds since the
    epoch and its prompt, and nothing else."""

    text: str = ""
    reasoning: str = ""
    token_ids: list[int] = []
    tokens: list[tuple[str, float]] = []
    """(text, logprob) of each of `token_ids`, where logprobs were asked for."""
    call_id: str = ""
    created: int = 0
    prompt_ids: list[int] = []
    index: int = 0
    """Which of a request's answers it belongs to."""


def json_object(text: str) -> dict[str, Any] | str:
    """The arguments of a tool call: templates print them with their own JSON filter, so they get values; text that is no JSON
    object stays text."""
    try:
        value = msgspec.json.decode(text or "{}")
    except (msgspec.DecodeError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def as_history(message: dict[str, Any]) -> dict[str, Any]:
    """A returned assistant message in the form that chat templates take."""
    made = {**message, "content": message["content"] or ""}
    if "tool_calls" in message:
        made["tool_calls"] = [
            {
                **call,
                "function": {
                    **call["function"],
                    "arguments": json_object(call["function"]["arguments"]),
                },
            }
            for call in message["tool_calls"]
        ]
    return made
