"""Scales of tokens: the sums they stand for, whatever way rollouts are cut into rows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from agl_ray.algorithms.aggregation import token_scales
from agl_ray.config.algorithm import AlgorithmConfig

MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)


def by_hand(losses: list[list[float]], mode: str, norm: int) -> float:
    """The aggregated loss of sequences given as the losses of their counted tokens; empty ones are not there."""
    there = [sequence for sequence in losses if sequence]
    flat = [loss for sequence in there for loss in sequence]
    means = [math.fsum(s) / len(s) for s in there]
    sums = [math.fsum(s) for s in there]
    return {
        "token-mean": math.fsum(flat) / len(flat),
        "token-sum": math.fsum(flat),
        "seq-mean-token-mean": math.fsum(means) / len(there),
        "seq-mean-token-sum": math.fsum(sums) / len(there),
        "seq-mean-token-sum-norm": math.fsum(sums) / len(there) / norm,
    }[mode]


@pytest.mark.parametrize("unit", ["rollout", "row"])
@pytest.mark.parametrize("mode", MODES)
def test_scales_add_up_to_the_aggregation(mode: str, unit: str) -> None:
    rng = np.random.default_rng(5)
    row = np.sort(rng.integers(0, 20, 300))
    rollout = np.array([0, 0, 0, 1, 1, 2, 3, 4, 4, 4, 5, 6, 7, 8, 9, 9, 9, 9, 10, 11])[row]
    counted = (rng.random(300) < 0.5).astype(np.float32)
    counted[row == 3] = 0  # a row without a counted token
    losses = rng.normal(size=300)
    given = {"aggregation": mode}
    if mode.startswith("seq"):
        given["unit"] = unit
    config = AlgorithmConfig.model_validate(given)
    scales = token_scales(counted, rollout, row, config)
    owner = rollout if mode.startswith("seq") and unit == "rollout" else row
    sequences = [losses[(owner == i) & (counted > 0)].tolist() for i in range(20)]
    assert (scales * losses).sum() == pytest.approx(by_hand(sequences, mode, config.norm_tokens))
    assert not scales[counted == 0].any()


def test_a_rollout_cut_into_more_rows_weighs_the_same() -> None:
    counted = np.ones(6)
    rollout = np.array([0, 0, 0, 0, 1, 1])
    config = AlgorithmConfig(aggregation="seq-mean-token-mean")
    whole = token_scales(counted, rollout, np.array([0, 0, 0, 0, 1, 1]), config)
    cut = token_scales(counted, rollout, np.array([0, 0, 1, 1, 2, 2]), config)
    assert whole.tolist() == cut.tolist() == [0.125] * 4 + [0.25] * 2
    by_row = AlgorithmConfig(aggregation="seq-mean-token-mean", unit="row")
    assert token_scales(counted, rollout, np.array([0, 0, 1, 1, 2, 2]), by_row).tolist() == (
        pytest.approx([1 / 6] * 6)
    )


def test_nothing_counted_scales_nothing() -> None:
    assert (
        token_scales(np.zeros(3), np.zeros(3), np.zeros(3), AlgorithmConfig()).tolist() == [0] * 3
    )
