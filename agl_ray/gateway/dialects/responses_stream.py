"""The OpenAI responses dialect, streams: pieces of an answer -> the Responses API's events, numbered from 0.

    response.created, response.in_progress
    an item of thoughts:  output_item.added, content_part.added, reasoning_text.delta ..., reasoning_text.done, content_part.done, output_item.done
    a message:            output_item.added, content_part.added, output_text.delta ..., output_text.done, content_part.done, output_item.done
    a function call:      output_item.added, function_call_arguments.delta, function_call_arguments.done, output_item.done
    response.completed (response.incomplete where the answer was cut by length), or error

Called by: `agl_ray/gateway/http.py`. Test alone: `pytest tests/unit/test_gateway_responses.py`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from agl_ray.gateway.canonical import CallRequest, CallResult, Refusal, Streamed, ToolCall
from agl_ray.gateway.dialects import responses_answer as answer
from agl_ray.gateway.dialects.chat_answer import logprob_entry

_PARTS = {"reasoning": "reasoning_text", "message": "output_text"}


class EventWriter:
    """The events of one streamed response."""

    def __init__(self, request: CallRequest, first: Streamed) -> None:
        self._request, self._first = request, first
        self._number = -1
        self._index = -1  # of the newest output item
        self._open: str | None = None  # type of the item that is open
        self._text = ""  # of the open item
        self._pending: list[dict[str, Any]] = []  # logprobs of tokens whose text is held back
        self._logprobs: list[dict[str, Any]] = []  # of all tokens

    def begin(self) -> list[bytes]:
        made = answer.response(self._request, self._first.call_id, self._first.created)
        kinds = ("response.created", "response.in_progress")
        return [self._event(kind, response=made) for kind in kinds]

    def piece(self, piece: Streamed) -> list[bytes]:
        new = [logprob_entry(*pair) for pair in piece.tokens]
        self._logprobs += new
        self._pending += new
        events: list[bytes] = []
        if piece.reasoning:
            events += self._grow("reasoning", piece.reasoning)
        if piece.text:
            events += self._grow("message", piece.text, logprobs=self._pending)
        if piece.reasoning or piece.text:
            self._pending = []
        return events

    def end(self, result: CallResult) -> list[bytes]:
        cut = result.finish_reason == "length"
        status = "incomplete" if cut else "completed"
        events = self._close(status)
        if self._index < 0 and not result.tool_calls:
            events += self._enter("message")
            events += self._close(status)
        for number, call in enumerate(result.tool_calls):
            events += self._call(number, call, status)
        made = answer.finished(self._request, result, None)
        for item in made["output"]:
            if item["type"] == "message":
                item["content"][0]["logprobs"] = self._logprobs
        events.append(self._event(f"response.{status}", response=made))
        return events

    def error(self, refusal: Refusal) -> bytes:
        """OpenAI's `error` event; the field `error` makes its client raise, whatever the agent looks at."""
        fields = refusal.fields()
        known = {key: fields[key] for key in ("code", "message", "param")}
        return self._event("error", **known, error=fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        data = msgspec.json.encode({"type": kind, "sequence_number": self._number, **fields})
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"

    def _at(self) -> dict[str, Any]:
        """Where the open item stands."""
        prefix = "rs_" if self._open == "reasoning" else "msg_"
        place = {"output_index": self._index, "content_index": 0}
        return {"item_id": f"{prefix}{self._first.call_id}", **place}

    def _item(self, text: str | None, status: str) -> dict[str, Any]:
        call_id = self._first.call_id
        if self._open == "reasoning":
            return answer.reasoning_item(call_id, text, status)
        return answer.message_item(call_id, text, self._logprobs if text else [], status)

    def _grow(self, kind: str, text: str, **fields: Any) -> list[bytes]:
        events = self._enter(kind)
        self._text += text
        name = f"response.{_PARTS[kind]}.delta"
        return [*events, self._event(name, **self._at(), delta=text, **fields)]

    def _enter(self, kind: str) -> list[bytes]:
        """Go on in the open item, or close it and open one of this kind."""
        if self._open == kind:
            return []
        events = self._close("completed")
        self._open, self._text, self._index = kind, "", self._index + 1
        item = self._item(None, "in_progress")
        events.append(
            self._event("response.output_item.added", output_index=self._index, item=item)
        )
        part = self._part("", [])
        events.append(self._event("response.content_part.added", **self._at(), part=part))
        return events

    def _part(self, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        if self._open == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return answer.text_part(text, logprobs)

    def _close(self, status: str) -> list[bytes]:
        if self._open is None:
            return []
        logprobs = {} if self._open == "reasoning" else {"logprobs": self._logprobs}
        name, text = f"response.{_PARTS[self._open]}.done", self._text
        part = self._part(text, self._logprobs)
        item = self._item(text, status)
        events = [
            self._event(name, **self._at(), text=text, **logprobs),
            self._event("response.content_part.done", **self._at(), part=part),
            self._event("response.output_item.done", output_index=self._index, item=item),
        ]
        self._open = None
        return events

    def _call(self, number: int, call: ToolCall, status: str) -> list[bytes]:
        self._index += 1
        call_id = self._first.call_id
        begun = answer.call_item(call_id, number, call, "", "in_progress")
        done = answer.call_item(call_id, number, call, call.arguments, status)
        place = {"item_id": begun["id"], "output_index": self._index}
        name = "response.function_call_arguments"
        return [
            self._event("response.output_item.added", output_index=self._index, item=begun),
            self._event(f"{name}.delta", **place, delta=call.arguments),
            self._event(f"{name}.done", **place, name=call.name, arguments=call.arguments),
            self._event("response.output_item.done", output_index=self._index, item=done),
        ]
