"""OpenAI's chat completions API from the caller's side: what many services and servers speak.

Called by: upstream.py. Pure: bodies in, bodies out. Test alone: `pytest tests/unit/test_gateway_upstream.py`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from agl_ray.gateway.canonical import CallRequest, Refusal
from agl_ray.gateway.upstream import Outside, Piece, Reader
from agl_ray.types import EngineError

_FINISH = {"stop": "stop", "tool_calls": "stop", "function_call": "stop", "length": "length"}


class OpenAIApi:
    """See `Api` of upstream.py. max_tokens_field: the name that the endpoint has for the limit of response tokens."""

    path = "/chat/completions"

    def __init__(self, max_tokens_field: str = "max_tokens") -> None:
        self._max_tokens = max_tokens_field

    def headers(self, key: str | None) -> dict[str, str]:
        return {} if key is None else {"authorization": f"Bearer {key}"}

    def body(self, request: CallRequest, model: str, max_tokens: int) -> dict[str, Any]:
        if request.thinking is not None:
            raise _no_words("thinking")
        unknown = request.template.keys() - {"reasoning_effort"}
        if unknown:
            raise _no_words(min(unknown))
        body = {
            "model": model,
            "messages": [_message(message) for message in request.messages],
            **{key: value for key, value in request.sampling.items() if key != "max_tokens"},
            **request.template,
            self._max_tokens: max_tokens,
        }
        if request.tools:
            body["tools"] = request.tools
            if not request.parse_tools:
                body["tool_choice"] = "none"
        if "tool" in request.constraint:
            name = request.constraint["tool"]
            named = {"type": "function", "function": {"name": name}}
            body["tool_choice"] = "required" if name is None else named
        elif "json" in request.constraint:
            form = {"name": "answer", "schema": request.constraint["json"]}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        elif request.constraint:
            body["response_format"] = {"type": "json_object"}
        if request.stream:
            body["stream_options"] = {"include_usage": True}
        return body

    def whole(self, body: dict[str, Any]) -> Outside:
        reader = _Reader()
        choices = body.get("choices")
        if not isinstance(choices, list) or not choices:
            raise EngineError(f"the endpoint answered without choices: {str(body)[:300]}")
        message = choices[0].get("message")
        if not isinstance(message, dict):
            raise EngineError(f"the endpoint answered without a message: {str(body)[:300]}")
        calls = [
            {"index": index, **call} for index, call in enumerate(message.get("tool_calls") or [])
        ]
        choice = {**choices[0], "delta": {**message, "tool_calls": calls}}
        reader.push({**body, "choices": [choice]})
        return reader.answer()

    def reader(self) -> _Reader:
        return _Reader()


class _Reader(Reader):
    finishes = _FINISH

    def push(self, event: dict[str, Any]) -> Piece:
        if event.get("error"):
            raise self._failed(event["error"])
        self._model = event.get("model") or self._model
        self._usage = event.get("usage") or self._usage
        choices = event.get("choices") or []
        if not choices:
            return Piece()
        delta = choices[0].get("delta") or {}
        text = delta.get("content") or delta.get("refusal") or ""
        reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
        for part in delta.get("tool_calls") or []:
            call = self._calls.setdefault(
                part.get("index", 0), {"id": "", "name": "", "arguments": ""}
            )
            function = part.get("function") or {}
            call["id"] = part.get("id") or call["id"]
            call["name"] = function.get("name") or call["name"]
            call["arguments"] += function.get("arguments") or ""
        self._finish = choices[0].get("finish_reason") or self._finish
        return self._more(text, reasoning)

    def counts(self) -> dict[str, int | None]:
        usage = self._usage
        prompt = usage.get("prompt_tokens_details") or {}
        response = usage.get("completion_tokens_details") or {}
        return {
            "prompt_tokens": usage.get("prompt_tokens"),
            "response_tokens": usage.get("completion_tokens"),
            "cached_tokens": prompt.get("cached_tokens") or 0,
            "reasoning_tokens": response.get("reasoning_tokens") or 0,
        }


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """A message in the API's form: the arguments of tool calls are JSON text."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"]["arguments"]
        if not isinstance(arguments, str):
            arguments = msgspec.json.encode(arguments).decode()
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "content": message["content"] or None, "tool_calls": calls}


def _no_words(field: str) -> Refusal:
    return Refusal(
        400,
        f"{field}: the outside endpoint of this role is asked over OpenAI's chat API, which has no such field; leave it out",
        param=field,
        code="unsupported_parameter",
    )
