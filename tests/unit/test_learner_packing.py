"""Packing: packed = unpacked = row by row, in values and gradients; and the trap it avoids is real."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from agl_ray.learner import head
from agl_ray.learner.attention import NAME, blocks_of
from agl_ray.learner.packing import Packed, pack, token_logprobs
from agl_ray.trajectory.ragged import Rows

VOCABULARY = 50


def tiny_model(seed: int = 0, **more: Any) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=False,
        **{"attn_implementation": "sdpa", **more},
    )
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)  # far from the uniform distribution, so that a leak shows
    return model


def ragged_rows(seed: int = 1, lengths: tuple[int, ...] = (7, 3, 12, 1, 5, 12, 2)) -> Rows:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, VOCABULARY, n) for n in lengths]
    return Rows.from_lists(ids, [rng.integers(0, 2, n) for n in lengths])


def row_by_row(model: Qwen3ForCausalLM, rows: Rows) -> torch.Tensor:
    """[N] by plain transformers, one row at a time, all logits in float64."""
    out = []
    for start, length in zip(rows.starts, rows.lengths, strict=True):
        ids = torch.from_numpy(rows.ids[start : start + length].astype(np.int64))[None]
        logits = model(input_ids=ids, use_cache=False).logits[0].double()
        logprobs = torch.log_softmax(logits[:-1], -1).gather(1, ids[0, 1:, None])[:, 0]
        out.append(torch.cat([torch.zeros(1, dtype=torch.float64), logprobs]))
    return torch.cat(out) * torch.from_numpy(rows.weights)


def unpacked(rows: Rows, packs: list[Packed], values: list[torch.Tensor]) -> torch.Tensor:
    """Values of the micro-batches, back in the order of `rows`."""
    pieces: dict[int, torch.Tensor] = {}
    for micro, value in zip(packs, values, strict=True):
        for row, piece in zip(micro.rows, value.split(micro.lengths.tolist()), strict=True):
            pieces[int(row)] = piece
    return torch.cat([pieces[row] for row in range(len(rows))])


def gradients(model: Qwen3ForCausalLM, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("tokens", [1, 8, 20, 1000])
@pytest.mark.parametrize("chunk", [VOCABULARY, 3 * VOCABULARY, 1 << 24])
@pytest.mark.parametrize("attention", ["sdpa", NAME])
def test_packed_equals_row_by_row(
    tokens: int, chunk: int, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(head.CHUNK_LOGITS, "cpu", chunk)
    model, rows = tiny_model(attn_implementation=attention), ragged_rows()
    weight = torch.from_numpy(np.random.default_rng(5).normal(size=len(rows.ids)))
    expected = row_by_row(model, rows)
    expected_gradients = gradients(model, (expected * weight).sum())
    packs = pack(rows, tokens)
    values = unpacked(rows, packs, [token_logprobs(model, micro) for micro in packs])
    got_gradients = gradients(model, (values * weight).sum())
    torch.testing.assert_close(values.double(), expected, atol=5e-6, rtol=0)
    for got, want in zip(got_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


def test_the_cache_leaks_between_rows_and_is_not_used() -> None:
    model, rows = tiny_model(), ragged_rows()
    micro = pack(rows, 1000)[0]
    arguments = {
        "input_ids": torch.from_numpy(micro.input_ids),
        "position_ids": torch.from_numpy(micro.position_ids),
    }
    isolated = model(**arguments, use_cache=False).logits
    leaking = model(**arguments, use_cache=True).logits
    assert (isolated - leaking).abs().max() > 0.1
    last = micro.lengths[:-1].sum()  # the last row of the micro-batch, alone
    alone = model(input_ids=arguments["input_ids"][:, last:], use_cache=False).logits
    torch.testing.assert_close(isolated[:, last:], alone, atol=1e-5, rtol=0)


def test_a_sliding_window_is_kept_inside_each_row() -> None:
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    model, rows = tiny_model(attn_implementation=NAME, **window), ragged_rows()
    assert model.config.layer_types == ["sliding_attention"] * 2
    packs = pack(rows, 1000)
    got = unpacked(rows, packs, [token_logprobs(model, micro) for micro in packs])
    torch.testing.assert_close(got.double(), row_by_row(model, rows), atol=5e-6, rtol=0)


def test_blocks_cover_all_tokens_once_and_hold_rows_of_like_length() -> None:
    lengths = np.array([40, 39, 21, 19, 8, 3, 1, 1])
    made = blocks_of(lengths, np.zeros(8, np.int64), torch.device("cpu"))
    covered = torch.cat([block.queries.flatten()[block.real] for block in made.blocks])
    assert covered.tolist() == list(range(int(lengths.sum())))
    shapes = [tuple(block.queries.shape) for block in made.blocks]
    assert shapes == [(3, 40), (1, 19), (1, 8), (1, 3), (2, 1)]
    assert all(torch.equal(block.queries, block.keys) for block in made.blocks)
    assert made.back is None
    assert all(block.mask(None) is None for block in made.blocks)


def test_temperature_divides_the_logits() -> None:
    model, rows = tiny_model(), ragged_rows()
    cool = Rows(
        rows.ids,
        rows.lengths,
        rows.weights,
        {"temperature": np.full(len(rows.ids), 0.5, np.float32)},
    )
    micro = pack(cool, 1000)[0]
    got = token_logprobs(model, micro)
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    want = token_logprobs(model, pack(rows, 1000)[0])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_the_head_is_left_as_it_was() -> None:
    model, rows = tiny_model(), ragged_rows()
    ids = torch.arange(5)[None]
    before = model(input_ids=ids, use_cache=False).logits
    token_logprobs(model, pack(rows, 1000)[0])
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, before)


def test_every_row_is_packed_once_within_the_budget() -> None:
    rows = ragged_rows(lengths=(5, 9, 30, 1, 4, 4, 4, 11))
    packs = pack(rows, 12)
    assert sorted(np.concatenate([micro.rows for micro in packs]).tolist()) == list(range(8))
    assert all(micro.num_tokens <= 12 or len(micro.rows) == 1 for micro in packs)
    for micro in packs:
        part = rows.take(micro.rows)
        np.testing.assert_array_equal(micro.input_ids[0], part.ids)
        np.testing.assert_array_equal(micro.weights, part.weights)


def test_nothing_weighted_gives_zeros_that_still_reach_the_model() -> None:
    rows = Rows.from_lists([[1, 2, 3]], [[0, 0, 0]])
    model = tiny_model()
    values = token_logprobs(model, pack(rows, 10)[0])
    assert values.tolist() == [0.0, 0.0, 0.0]
    values.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": np.array([3, 0])}, "empty row"),
        ({"lengths": np.array([2])}, "sum of lengths"),
        ({"weights": np.ones(3, np.float32)}, "first token"),
        ({"columns": {"x": np.zeros(2)}}, "Rows.x"),
    ],
)
def test_rows_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    good = {
        "ids": np.arange(3, dtype=np.int32),
        "lengths": np.array([3]),
        "weights": np.array([0, 1, 1], np.float32),
    }
    with pytest.raises(ValueError, match=message):
        Rows(**{**good, **change})
