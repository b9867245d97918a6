"""Ids to text by a table: the same text as the tokenizer's own, whole and in broken pieces, and the tokenizer itself where a table cannot be."""

from __future__ import annotations

import pytest
from gateway_fakes import END, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from agl_ray.gateway.decoding import Decoder


def plain() -> Tokenizer:
    return make_tokenizer()


def added() -> Tokenizer:
    """With tokens whose text is no byte's character, or looks as if it were."""
    made = make_tokenizer()
    made.add_tokens([AddedToken("\u4e2d\u6587"), AddedToken("a b"), AddedToken("\u0120\u00e9")])
    return made


def spaced() -> Tokenizer:
    """As sentencepiece's: its pieces carry their spaces in a mark."""
    made = Tokenizer(models.WordLevel({"<unk>": 0, "\u2581a": 1, "\u2581b": 2}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return made


TOKENIZERS = {"plain": plain(), "added": added(), "spaced": spaced()}
SIZES = {name: one.get_vocab_size(with_added_tokens=True) for name, one in TOKENIZERS.items()}
DECODERS = {name: Decoder(one) for name, one in TOKENIZERS.items()}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(places=st.lists(st.floats(0, 1, exclude_max=True), max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_ids_read_as_the_tokenizer_reads_them(name: str, places: list[float]) -> None:
    ids = [int(place * SIZES[name]) for place in places]
    expected = TOKENIZERS[name].decode(ids, skip_special_tokens=False)
    assert DECODERS[name].decode(ids) == expected
    assert DECODERS[name].decode(tuple(ids)) == expected


@given(text=st.text(max_size=40), cut=st.integers(0, 40))
@settings(max_examples=200, deadline=None)
def test_text_comes_back_and_half_a_character_reads_the_same(text: str, cut: int) -> None:
    backend, decoder = TOKENIZERS["plain"], DECODERS["plain"]
    ids = backend.encode(text + END, add_special_tokens=False).ids
    assert decoder.decode(ids) == text + END
    for part in (ids[:cut], ids[cut:]):
        assert decoder.decode(part) == backend.decode(part, skip_special_tokens=False)


def test_only_byte_level_tokenizers_are_looked_up() -> None:
    assert {name: one.looks_up for name, one in DECODERS.items()} == {
        "plain": True,
        "added": True,
        "spaced": False,
    }


def test_an_unknown_id_is_the_tokenizers_business() -> None:
    ids = [1, SIZES["plain"] + 5, 2]
    expected = TOKENIZERS["plain"].decode(ids, skip_special_tokens=False)
    assert DECODERS["plain"].decode(ids) == expected
