"""The model's thoughts apart from its answer: vLLM's reasoning parser of this model, whole and for a growing text.

Called by: render.py (makes one `Thoughts` per model folder) and visible.py (`Thoughts.whole` reads finished answers, a `Split` per
stream runs ahead with what is certain). The parser's verdict on the whole text counts; a stream only uses the marks that the parser
names. White space around the marks belongs to neither part. Test alone: `pytest tests/unit/test_gateway_reasoning.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from agl_ray.types import InputError


class Thoughts:
    """vLLM's parser `name` with this tokenizer (transformers'). InputError where vLLM knows no such parser, or where the tokenizer
    has not the tokens that the parser looks for."""

    def __init__(self, name: str, tokenizer: Any) -> None:
        self._parser = _load(name, tokenizer)
        self.start: str | None = self._parser.reasoning_start_str or None
        self.end: str | None = self._parser.reasoning_end_str or None
        # What the parser makes of an answer that opens no thought: all of it is one (R1: the prompt opened it), or none.
        self.implicit = self.whole("x")[0] is not None
        # Some parsers let a tool call end the thoughts, closed or not.
        self.breaks = "<tool_call>" if self._breaks_at("<tool_call>") else None
        end = [] if self.end is None else tokenizer.encode(self.end, add_special_tokens=False)
        self._end_id = end[0] if len(end) == 1 else None

    def over(self, prompt_tail: Sequence[int]) -> bool:
        """Whether the prompt's last turn (P ids) already says that there are no thoughts in the answer (thinking switched off)."""
        ended = self._end_id is not None and self._end_id in prompt_tail
        return ended and bool(self._parser.is_reasoning_end(list(prompt_tail)))

    def whole(self, text: str) -> tuple[str | None, str]:
        """(thoughts or None, the rest) of a finished answer."""
        reasoning, content = self._parser.extract_reasoning(text, None)
        if reasoning is None or not reasoning.strip():
            return None, (content or "").lstrip() if self._marked(text) else content or ""
        return reasoning.strip(), (content or "").lstrip()

    def count(self, ids: Sequence[int]) -> int:
        """Response tokens up to the mark that ends the thoughts, or all of them where there is none."""
        if self._end_id is not None and self._end_id in ids:
            return list(ids).index(self._end_id) + 1
        return len(ids)

    def _breaks_at(self, mark: str) -> bool:
        if self.start is None or self.end is None:
            return False
        reasoning, _ = self._parser.extract_reasoning(f"{self.start}a{mark}b{self.end}c", None)
        return bool(reasoning != f"a{mark}b")

    def _marked(self, text: str) -> bool:
        return self.end is not None and self.end in text


class Split:
    """A growing answer: `push` the text so far, read `content_at` (where the answer begins, None: not yet known)."""

    def __init__(self, thoughts: Thoughts, over: bool) -> None:
        self._thoughts = thoughts
        self._from: int | None = None  # where the thoughts begin, once that is known
        # Without marks to look for, nothing is certain before the end.
        self._blind = thoughts.start is None or thoughts.end is None
        self.content_at: int | None = 0 if over else None
        self.reasoning = ""  # as far as it is certain

    def push(self, text: str, limit: int) -> None:
        """`text` is the answer so far, of which the first `limit` characters cannot be taken back."""
        start, end, breaks = self._thoughts.start, self._thoughts.end, self._thoughts.breaks
        if self._blind or self.content_at is not None or start is None or end is None:
            return
        if self._from is None and not self._opened(text, start):
            return
        begin = self._from or 0
        at = text.find(end, begin)
        broken = text.find(breaks, begin) if breaks else -1
        if broken >= 0 and (at < 0 or broken < at):
            self.reasoning = text[begin:broken].strip()
            self._blind = True  # what belongs where is for the parser to say
        elif at >= 0:
            self.reasoning = text[begin:at].strip()
            self.content_at = at + len(end)
        else:
            held = max(overlap(text, mark) for mark in (end, breaks or end))
            certain = text[begin : max(begin, min(limit, len(text) - held))]
            self.reasoning = certain.strip()

    def _opened(self, text: str, start: str) -> bool:
        """Whether it is known by now that thoughts come, and where they begin."""
        lead = len(text) - len(text.lstrip())
        if text.startswith(start, lead):
            self._from = lead + len(start)
        elif start.startswith(text[lead:]):
            return False
        elif self._thoughts.implicit:
            self._from = 0
        else:
            self.content_at = 0
        return self._from is not None


def overlap(text: str, mark: str) -> int:
    """The number of characters at the end of `text` that may be the beginning of `mark`."""
    for size in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:size]):
            return size
    return 0


def _load(name: str, tokenizer: Any) -> Any:
    from vllm.reasoning import ReasoningParserManager

    # It logs a stack trace for each parser that cannot be loaded; the error below says it better.
    logging.getLogger("vllm.reasoning").setLevel(logging.CRITICAL)
    try:
        kind = ReasoningParserManager.get_reasoning_parser(name)
    except KeyError as error:
        known = ", ".join(ReasoningParserManager.list_registered())
        raise InputError(
            f"engine.reasoning_parser: vLLM knows no parser {name!r}; expected one of {known}"
        ) from error
    except ImportError as error:
        raise InputError(
            f"engine.reasoning_parser: vLLM's parser {name!r} needs the package {error.name}, which is not installed; "
            f"install it on the nodes of the gateway (pip install {error.name})"
        ) from error
    try:
        return kind(tokenizer)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"engine.reasoning_parser: {name!r} does not fit this model's tokenizer ({error}); choose the parser of this model"
        ) from error
