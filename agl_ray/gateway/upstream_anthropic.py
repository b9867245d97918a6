"""Anthropic's messages API from the caller's side.

Called by: upstream.py. Pure: bodies in, bodies out. Test alone: `pytest tests/unit/test_gateway_upstream.py`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from agl_ray.gateway.canonical import CallRequest, Refusal
from agl_ray.gateway.upstream import Outside, Piece, Reader
from agl_ray.types import EngineError

VERSION = "2023-06-01"
_FINISH = {
    "end_turn": "stop",
    "tool_use": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
}
_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "stop": "stop_sequences",
}


class AnthropicApi:
    """See `Api` of upstream.py."""

    path = "/v1/messages"

    def headers(self, key: str | None) -> dict[str, str]:
        version = {"anthropic-version": VERSION}
        return version if key is None else {**version, "x-api-key": key}

    def body(self, request: CallRequest, model: str, max_tokens: int) -> dict[str, Any]:
        unknown = request.sampling.keys() - {*_SAMPLING, "max_tokens"} | request.template.keys()
        if request.thinking or "json_object" in request.constraint:
            unknown |= {"thinking" if request.thinking else "response_format"}
        if unknown:
            raise _no_words(min(unknown))
        said = [message for message in request.messages if message["role"] != "system"]
        system = [m["content"] for m in request.messages if m["role"] == "system"]
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": max_tokens,
            "messages": _messages(said),
        }
        for ours, theirs in _SAMPLING.items():
            if ours in request.sampling:
                body[theirs] = request.sampling[ours]
        if system:
            body["system"] = "\n\n".join(system)
        if request.thinking is False:
            body["thinking"] = {"type": "disabled"}
        if request.tools:
            body["tools"] = [_tool(tool["function"]) for tool in request.tools]
            if not request.parse_tools:
                body["tool_choice"] = {"type": "none"}
        if "tool" in request.constraint:
            name = request.constraint["tool"]
            body["tool_choice"] = {"type": "tool", "name": name} if name else {"type": "any"}
        elif "json" in request.constraint:
            form = {"type": "json_schema", "schema": request.constraint["json"]}
            body["output_config"] = {"format": form}
        return body

    def whole(self, body: dict[str, Any]) -> Outside:
        reader = _Reader()
        if not isinstance(body.get("content"), list):
            raise EngineError(f"the endpoint answered without content: {str(body)[:300]}")
        reader.push({"type": "message_start", "message": body})
        for index, block in enumerate(body["content"]):
            reader.push({"type": "content_block_start", "index": index, "content_block": block})
        reader.push({"type": "message_delta", "delta": body, "usage": body.get("usage")})
        return reader.answer()

    def reader(self) -> _Reader:
        return _Reader()


class _Reader(Reader):
    finishes = _FINISH

    def push(self, event: dict[str, Any]) -> Piece:
        kind = event.get("type")
        if kind == "error":
            raise self._failed(event.get("error"))
        if kind == "message_start":
            self._model = event["message"].get("model")
            self._usage = event["message"].get("usage") or {}
        elif kind == "content_block_start":
            return self._block(event["index"], event["content_block"])
        elif kind == "content_block_delta":
            return self._delta(event["index"], event["delta"])
        elif kind == "message_delta":
            self._finish = event["delta"].get("stop_reason") or self._finish
            self._stop = event["delta"].get("stop_sequence")
            self._usage = {**self._usage, **(event.get("usage") or {})}
        return Piece()

    def _block(self, index: int, block: dict[str, Any]) -> Piece:
        if block["type"] == "tool_use":
            given = block.get("input")
            arguments = msgspec.json.encode(given).decode() if given else ""
            self._calls[index] = {
                "id": block["id"],
                "name": block["name"],
                "arguments": arguments,
            }
        return self._more(block.get("text") or "", block.get("thinking") or "")

    def _delta(self, index: int, delta: dict[str, Any]) -> Piece:
        if delta["type"] == "input_json_delta":
            self._calls[index]["arguments"] += delta["partial_json"]
        return self._more(delta.get("text") or "", delta.get("thinking") or "")

    def counts(self) -> dict[str, int | None]:
        usage = self._usage
        cached = usage.get("cache_read_input_tokens") or 0
        fresh = usage.get("input_tokens")
        written = usage.get("cache_creation_input_tokens") or 0
        return {
            "prompt_tokens": None if fresh is None else fresh + written + cached,
            "response_tokens": usage.get("output_tokens"),
            "cached_tokens": cached,
        }


def _messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """In the API's form: user and assistant take turns, and a tool's result is the user's."""
    made: list[dict[str, Any]] = []
    for message in messages:
        role = "assistant" if message["role"] == "assistant" else "user"
        if not made or made[-1]["role"] != role:
            made.append({"role": role, "content": []})
        made[-1]["content"] += _blocks(message)
    return [message for message in made if message["content"]]


def _blocks(message: dict[str, Any]) -> list[dict[str, Any]]:
    if message["role"] == "tool":
        given = {"tool_use_id": message["tool_call_id"], "content": message["content"]}
        return [{"type": "tool_result", **given}]
    blocks = [{"type": "text", "text": message["content"]}] if message["content"] else []
    for call in message.get("tool_calls") or []:
        arguments = call["function"]["arguments"]
        if not isinstance(arguments, dict):
            raise Refusal(
                400,
                f"messages: the arguments of a tool call must be a JSON object for an Anthropic endpoint, got {arguments!r}",
                param="messages",
                code="invalid_value",
            )
        name = call["function"]["name"]
        blocks.append({"type": "tool_use", "id": call["id"], "name": name, "input": arguments})
    return blocks


def _tool(function: dict[str, Any]) -> dict[str, Any]:
    described = {"description": function["description"]} if function.get("description") else {}
    schema = function.get("parameters") or {"type": "object"}
    return {"name": function["name"], **described, "input_schema": schema}


def _no_words(field: str) -> Refusal:
    return Refusal(
        400,
        f"{field}: the outside endpoint of this role is asked over Anthropic's messages API, which has no words for it; leave it out",
        param=field,
        code="unsupported_parameter",
    )
