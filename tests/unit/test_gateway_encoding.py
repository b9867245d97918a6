"""The encoder that remembers: the same ids as the tokenizer's own, whatever was asked before, and a bounded memory."""

from __future__ import annotations

from typing import Any

import pytest
from gateway_fakes import END, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from agl_ray.gateway import encoding
from agl_ray.gateway.encoding import Encoder

MARKS = ["<|im_start|>", END]
LETTERS = "ab \n1\u00e9\u4e2d\u0301<|>im_end"


def spaced() -> Tokenizer:
    """A tokenizer that puts a space before the first word of all, as sentencepiece's do."""
    made = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    alphabet = {chr(code): code for code in range(1, 256)} | {"\u2581": 300}
    made.model = models.BPE(vocab={"<unk>": 0, **alphabet}, merges=[], unk_token="<unk>")
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.add_special_tokens(MARKS)
    return made


def composing() -> Tokenizer:
    """A tokenizer that normalises, splits by a pattern, and has tokens that are matched in normalised text."""
    made = make_tokenizer()
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+|\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    made.add_tokens([AddedToken("ab", normalized=True)])
    return made


TOKENIZERS = {"plain": make_tokenizer(), "spaced": spaced(), "composing": composing()}
PIECES = st.text(LETTERS, max_size=30) | st.sampled_from(MARKS)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(texts=st.lists(st.lists(PIECES, max_size=8), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_the_ids_are_the_tokenizers_own(name: str, texts: list[list[str]]) -> None:
    backend = TOKENIZERS[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "LONG", 6)
        encoder = Encoder(backend, MARKS)
        for pieces in [*texts, *texts]:
            text = "".join(pieces)
            assert encoder.encode(text) == backend.encode(text, add_special_tokens=False).ids


def test_only_tokenizers_that_cut_there_are_cut() -> None:
    assert Encoder(TOKENIZERS["plain"], MARKS)._cut is not None
    assert Encoder(TOKENIZERS["composing"], MARKS)._cut is not None
    assert Encoder(TOKENIZERS["spaced"], MARKS)._cut is None
    greedy = make_tokenizer()
    greedy.add_special_tokens([AddedToken("x<|", normalized=False)])
    assert Encoder(greedy, MARKS)._cut is None
    stripping = make_tokenizer()
    stripping.add_special_tokens([AddedToken("<sep>", rstrip=True)])
    assert Encoder(stripping, ["<sep>", "absent"])._cut is None


class Counting:
    """A tokenizer that counts the characters it is asked for."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend, self.asked = backend, 0

    def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
        self.asked += sum(map(len, texts))
        return self._backend.encode_batch_fast(texts, **options)

    def get_added_tokens_decoder(self) -> Any:
        return self._backend.get_added_tokens_decoder()


def test_a_shared_prompt_is_tokenised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Counting(TOKENIZERS["plain"])
    encoder = Encoder(backend, MARKS)
    system = "You are a calculator agent. " * 40
    backend.asked = 0
    for number in range(50):
        encoder.encode(f"<|im_start|>system\n{system}{END}\n<|im_start|>user\n{number}{END}")
    assert backend.asked < len(system) + 50 * 80
    monkeypatch.setattr(encoding, "MOST_CHARACTERS", 5000)
    for number in range(20):
        encoder.encode(f"{number} " * 500)
        assert encoder.held_characters <= 5000
