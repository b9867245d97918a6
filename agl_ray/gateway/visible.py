"""What the caller sees of an answer: text without the end-of-turn id and the stop string, tool calls, pieces of a stream.

Called by: the door. A streamed answer and a whole one are read by the same functions, so that they give the same message; the
stream only runs ahead with the text that is certain: not with what may become a stop string or a tool call. As in vLLM, special
tokens inside an answer are shown only where tool calls are parsed, since some models write those with special tokens.
Test alone: `pytest tests/unit/test_gateway_door.py`.
"""

from __future__ import annotations

from typing import Any

from agl_ray.gateway.canonical import CallRequest, ToolCall
from agl_ray.gateway.dialects.chat_answer import logprob_entry
from agl_ray.gateway.engine_api import GenerateChunk, GenerateResult
from agl_ray.gateway.render import Detokenizer, Renderer


def visible_text(renderer: Renderer, answer: GenerateResult, keep_special: bool) -> str:
    """The answer's text up to the id or string that ended it."""
    ids = answer.response_ids
    if answer.finish_reason == "stop" and not isinstance(answer.stop_reason, str):
        ids = ids[:-1]
    text = renderer.decode(ids, keep_special)
    if isinstance(answer.stop_reason, str):
        text = text.partition(answer.stop_reason)[0]
    return text


def visible_message(
    renderer: Renderer, request: CallRequest, text: str, sent: str
) -> tuple[str | None, list[ToolCall]]:
    """(content, tool calls) of the answer. `sent` is what a stream has already shown of the content: it stands."""
    content: str | None = text
    calls: list[ToolCall] = []
    if request.parse_tools:
        content, calls = renderer.find_tool_calls(text, request.tools or [])
    if not (content or "").startswith(sent):
        content = sent
    return (content if content or not calls else None), calls


class Visible:
    """The growing answer of one stream. `chunks` are the engine's, `sent` the text that was given out."""

    def __init__(self, renderer: Renderer, request: CallRequest, stop: list[str]) -> None:
        self.chunks: list[GenerateChunk] = []
        self.sent = ""
        self._renderer, self._request = renderer, request
        self._detokenizer = Detokenizer(renderer, keep_special=request.parse_tools)
        self._pending: list[int] = []
        self._text = ""
        self._marks = list(stop)
        if request.parse_tools and renderer.tool_start is not None:
            self._marks.append(renderer.tool_start)
        # A parser that names no start of a tool call may find one anywhere: nothing is certain before the end.
        self._hold_all = request.parse_tools and renderer.tool_start is None

    @property
    def ended(self) -> bool:
        return bool(self.chunks) and self.chunks[-1].finish_reason is not None

    def push(self, chunk: GenerateChunk) -> tuple[str, list[dict[str, Any]]]:
        """(text that is certain now, logprob entries of the chunk's tokens where asked for)."""
        self.chunks.append(chunk)
        entries = []
        if self._request.logprobs:
            tokens = self._renderer.token_texts(chunk.response_ids)
            pairs = zip(tokens, chunk.logprobs, strict=True)
            entries = [logprob_entry(*pair) for pair in pairs]
        ids = [*self._pending, *chunk.response_ids]
        self._pending = []
        if chunk.finish_reason == "stop" and not isinstance(chunk.stop_reason, str):
            ids = ids[:-1]  # the end-of-turn id is not shown
        elif chunk.finish_reason is None and ids and ids[-1] in self._renderer.stop_ids:
            self._pending = [ids.pop()]  # the next chunk says whether the turn ended here
        self._text += self._detokenizer.push(ids)
        certain = "" if self._hold_all else self._text[: self._certain()]
        text = certain[len(self.sent) :]
        self.sent += text
        return text, entries

    def _certain(self) -> int:
        """Characters that no stop string or tool call can take back."""
        end = len(self._text)
        for mark in self._marks:
            at = self._text.find(mark)
            if at >= 0:
                end = min(end, at)
                continue
            for size in range(min(len(mark) - 1, len(self._text)), 0, -1):
                if self._text.endswith(mark[:size]):
                    end = min(end, len(self._text) - size)
                    break
        return end
