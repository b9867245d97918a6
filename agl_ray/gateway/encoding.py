"""Text to ids, and no text twice: long pieces between special tokens are remembered.

A tokenizer cuts a text at its special tokens before anything else, so what stands between two of them has ids of its own, wherever it
stands: a system prompt, a tool list, the first prompt that the rollouts of a group share, the turns of a conversation that the template
renders anew. That is checked on probes when an Encoder is made; a tokenizer that does otherwise (a first space put before the text, say)
is asked for whole texts. Tokenising 8,000 new tokens takes about 10 ms of CPU, finding them again 0.1 ms. Called by: render.py. Test
alone: `pytest tests/unit/test_gateway_encoding.py`.
"""

from __future__ import annotations

import itertools
import re
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from agl_ray.gateway.reasoning import overlap

LONG = 512  # characters of a piece that is worth remembering
MOST_CHARACTERS = 16 * 2**20  # of all that is remembered; their ids take about as many bytes
_PROBES = [
    "a",
    " b",
    "c ",
    "\n",
    "\n\nd",
    "12",
    "e\u0301",
    "\u0301f",
    "  ",
    "G.",
    "\u4e2d",
    "\u00a0",
]


class Encoder:
    """The ids of texts by a tokenizers' `Tokenizer`; `marks` are texts of special tokens where it may be cut."""

    def __init__(self, backend: Any, marks: Iterable[str] = ()) -> None:
        self._backend = backend
        self._known: OrderedDict[str, array[int]] = OrderedDict()
        self._held = 0  # characters in _known
        safe = [mark for mark in dict.fromkeys(marks) if self._cuts_at(mark)]
        alternatives = "|".join(re.escape(mark) for mark in sorted(safe, key=len, reverse=True))
        self._cut = re.compile(f"({alternatives})") if safe else None

    @property
    def held_characters(self) -> int:
        """Characters of the texts that are remembered."""
        return self._held

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without the tokens that a model's whole input begins with."""
        if len(text) < LONG:
            return self._plain(text)
        if self._cut is None:
            return self._long(text).tolist()
        ids: list[int] = []
        short: list[
            str
        ] = []  # pieces and marks since the last long piece: one call of the tokenizer
        for piece in self._cut.split(text):
            if len(piece) < LONG:
                short.append(piece)
                continue
            ids += self._plain("".join(short))
            ids += self._long(piece)
            short.clear()
        return ids + self._plain("".join(short))

    def _plain(self, text: str) -> list[int]:
        # Without offsets into the text, which nobody here asks for and which take a third of the time.
        found = self._backend.encode_batch_fast([text], add_special_tokens=False) if text else []
        ids: list[int] = found[0].ids if found else []
        return ids

    def _long(self, piece: str) -> array[int]:
        known = self._known.get(piece)
        if known is not None:
            self._known.move_to_end(piece)
            return known
        made = array("i", self._plain(piece))
        self._known[piece] = made
        self._held += len(piece)
        while self._held > MOST_CHARACTERS:
            self._held -= len(self._known.popitem(last=False)[0])
        return made

    def _cuts_at(self, mark: str) -> bool:
        """Whether text before and behind this token never changes each other's ids."""
        tokens = self._backend.get_added_tokens_decoder().values()
        own = next((token for token in tokens if token.content == mark), None)
        if own is None or own.normalized or own.lstrip or own.rstrip or own.single_word:
            return False
        if any(
            t.content != mark and (mark in t.content or overlap(t.content, mark)) for t in tokens
        ):
            return False  # in "<a><b" the token "><" would win over "<b"
        alone = {text: self._plain(text) for text in ("", mark, *_PROBES)}
        return all(
            self._plain(before + mark + behind) == alone[before] + alone[mark] + alone[behind]
            for before, behind in itertools.product(("", *_PROBES), repeat=2)
        )
