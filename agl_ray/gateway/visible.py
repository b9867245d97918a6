"""What the caller sees of an answer: thoughts, text without the end-of-turn id and the stop string, tool calls, pieces of a stream.

Called by: the door. A streamed answer and a whole one are read by the same functions, so that they give the same message; the
stream only runs ahead with the text that is certain: not with what may become a stop string or a tool call. As in vLLM, special
tokens inside an answer are shown only where tool calls or thoughts are parsed, since some models write those with special tokens.
Test alone: `pytest tests/unit/test_gateway_door.py tests/unit/test_gateway_reasoning.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from agl_ray.gateway.canonical import CallRequest, Streamed, ToolCall
from agl_ray.gateway.engine_api import GenerateChunk, GenerateResult
from agl_ray.gateway.reasoning import Split, overlap
from agl_ray.gateway.render import Detokenizer, Renderer


@dataclass(frozen=True)
class Reading:
    """How the answer to one call is to be read. `over`: the prompt leaves no room for thoughts; `stop`: the call's stop strings."""

    renderer: Renderer
    request: CallRequest
    over: bool
    stop: list[str]

    @property
    def keep_special(self) -> bool:
        return self.request.parse_tools or not self.over


@dataclass(frozen=True)
class Message:
    """An answer as the caller sees it."""

    reasoning: str | None
    content: str | None
    tool_calls: list[ToolCall]


def visible_text(renderer: Renderer, answer: GenerateResult, keep_special: bool) -> str:
    """The answer's text up to the id or string that ended it."""
    ids = answer.response_ids
    if answer.finish_reason == "stop" and not isinstance(answer.stop_reason, str):
        ids = ids[:-1]
    text = renderer.decode(ids, keep_special)
    if isinstance(answer.stop_reason, str):
        text = text.partition(answer.stop_reason)[0]
    return text


def visible_message(reading: Reading, answer: GenerateResult, shown: Visible | None) -> Message:
    """The whole answer. What a stream (`shown`) has already given out of it stands."""
    text = visible_text(reading.renderer, answer, reading.keep_special)
    thoughts = reading.renderer.thoughts
    reasoning: str | None = None
    content: str | None = text
    calls: list[ToolCall] = []
    if thoughts is not None and not reading.over:
        reasoning, content = thoughts.whole(text)
    if reading.request.parse_tools:
        content, calls = reading.renderer.find_tool_calls(
            content or "", reading.request.tools or []
        )
    if not reading.request.parallel:
        calls = calls[:1]
    if shown is not None and not (reasoning or "").startswith(shown.reasoning):
        reasoning = shown.reasoning
    if shown is not None and not (content or "").startswith(shown.sent):
        content = shown.sent
    empty = not content and (calls or reasoning is not None)
    return Message(reasoning, None if empty else content, calls)


class Visible:
    """The growing answer of one stream. `chunks` are the engine's, `reasoning` and `sent` what was given out of its thoughts and
    its text."""

    def __init__(self, reading: Reading) -> None:
        self.chunks: list[GenerateChunk] = []
        self.sent = ""
        self.reasoning = ""
        self._renderer, self._request = reading.renderer, reading.request
        self._detokenizer = Detokenizer(self._renderer, keep_special=reading.keep_special)
        self._pending: list[int] = []
        self._text = ""
        self._stop = list(reading.stop)
        thoughts = self._renderer.thoughts
        self._split = Split(thoughts, over=False) if thoughts and not reading.over else None
        tools = self._request.parse_tools
        start = self._renderer.tool_start
        self._tool_marks = [start] if tools and start is not None else []
        # A parser that names no start of a tool call may find one anywhere: nothing is certain before the end.
        self._hold_all = tools and start is None

    @property
    def ended(self) -> bool:
        return bool(self.chunks) and self.chunks[-1].finish_reason is not None

    def push(self, chunk: GenerateChunk) -> Streamed:
        """What is certain now."""
        self.chunks.append(chunk)
        tokens: list[tuple[str, float]] = []
        if self._request.logprobs:
            texts = self._renderer.token_texts(chunk.response_ids)
            tokens = list(zip(texts, chunk.logprobs, strict=True))
        ids = [*self._pending, *chunk.response_ids]
        self._pending = []
        if chunk.finish_reason == "stop" and not isinstance(chunk.stop_reason, str):
            ids = ids[:-1]  # the end-of-turn id is not shown
        elif chunk.finish_reason is None and ids and ids[-1] in self._renderer.stop_ids:
            self._pending = [ids.pop()]  # the next chunk says whether the turn ended here
        self._text += self._detokenizer.push(ids)
        reasoning, text = self._news()
        return Streamed(text=text, reasoning=reasoning, token_ids=chunk.response_ids, tokens=tokens)

    def rest(self, reasoning: str | None, content: str | None) -> Streamed:
        """What the whole answer has beyond what was given out."""
        return Streamed(
            text=(content or "")[len(self.sent) :],
            reasoning=(reasoning or "")[len(self.reasoning) :],
        )

    def _news(self) -> tuple[str, str]:
        """(thoughts, text) that have become certain since the last call."""
        content, reasoning = self._text, ""
        if self._split is not None:
            self._split.push(self._text, _certain(self._text, self._stop))
            reasoning = self._split.reasoning[len(self.reasoning) :]
            self.reasoning += reasoning
            at = self._split.content_at
            if at is None:
                return reasoning, ""
            content = self._text[at:].lstrip() if at else self._text
        certain = (
            "" if self._hold_all else content[: _certain(content, [*self._stop, *self._tool_marks])]
        )
        text = certain[len(self.sent) :]
        self.sent += text
        return reasoning, text


def _certain(text: str, marks: list[str]) -> int:
    """Characters that no stop string or tool call can take back."""
    end = len(text)
    for mark in marks:
        at = text.find(mark)
        end = min(end, at if at >= 0 else len(text) - overlap(text, mark))
    return end
