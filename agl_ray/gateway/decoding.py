"""Ids to text. A byte-level tokenizer's ids stand for bytes each, so their text is looked up and joined, in a tenth of the tokenizer's time.

That its decoder is of this kind is checked on every single byte, on the added tokens and on sequences when a Decoder is made; any other
tokenizer (sentencepiece's) is asked itself. Called by: render.py. Test alone: `pytest tests/unit/test_gateway_decoding.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

# Ids on which the table is compared with the tokenizer, alone and in runs: the first are mostly single bytes, the last added tokens.
PROBES, RUN = 600, 7


class Decoder:
    """The text of ids by a tokenizers' `Tokenizer`, special tokens included; parts of characters read as U+FFFD."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._table = _table(backend)

    @property
    def looks_up(self) -> bool:
        """Whether the ids' bytes are known, so that the tokenizer is not asked."""
        return self._table is not None

    def decode(self, ids: Sequence[int]) -> str:
        if self._table is not None:
            try:
                return b"".join([self._table[one] for one in ids]).decode(errors="replace")
            except KeyError:
                pass  # an id that the tokenizer does not know: it says what becomes of that
        return str(self._backend.decode(list(ids), skip_special_tokens=False))


def _table(backend: Any) -> dict[int, bytes] | None:
    """Each id's bytes; None where the tokenizer does not decode by bytes."""
    from tokenizers import decoders

    if not isinstance(backend.decoder, decoders.ByteLevel):
        return None
    of = _bytes_of_characters()
    table = {
        number: _token_bytes(token, of)
        for token, number in backend.get_vocab(with_added_tokens=True).items()
    }
    return table if all(_same(backend, table, ids) for ids in _probes(sorted(table))) else None


def _probes(ids: list[int]) -> Iterable[list[int]]:
    chosen = [*ids[:PROBES], *ids[-PROBES:]]
    yield from ([one] for one in chosen)
    yield from (chosen[at : at + RUN] for at in range(0, len(chosen), RUN))


def _same(backend: Any, table: dict[int, bytes], ids: list[int]) -> bool:
    made = b"".join([table[one] for one in ids]).decode(errors="replace")
    return bool(made == backend.decode(ids, skip_special_tokens=False))


def _token_bytes(token: str, of: dict[str, int]) -> bytes:
    """What a token stands for; one with a character that is no byte's (an added token's text) stands for itself."""
    try:
        return bytes([of[character] for character in token])
    except KeyError:
        return token.encode()


def _bytes_of_characters() -> dict[str, int]:
    """The characters in which byte-level tokenizers write bytes: a printable one as itself, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + place): byte for place, byte in enumerate(others)
    }
