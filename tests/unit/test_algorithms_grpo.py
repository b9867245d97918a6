"""GRPO's advantages against a transcription in float64, and what its loss counts. The losses: test_algorithms_losses.py."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from loss_streams import inputs_of, random_streams

from agl_ray.algorithms.algorithm import make_algorithm
from agl_ray.algorithms.base import LossInputs
from agl_ray.config.models import AlgorithmConfig


def advantages_by_hand(rewards: np.ndarray, groups: np.ndarray, std: bool) -> list[float]:
    out = []
    for reward, group in zip(rewards, groups, strict=True):
        mine = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        mean = math.fsum(mine) / len(mine)
        advantage = reward - mean
        if std:
            deviation = math.sqrt(math.fsum((r - mean) ** 2 for r in mine) / len(mine))
            advantage /= deviation + 1e-6
        out.append(advantage)
    return out


def normalize(std: bool) -> Any:
    return "group" if std else "none"


@pytest.mark.parametrize("std", [False, True])
def test_advantages_of_ragged_groups(std: bool) -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 7, 60)  # neither sorted nor of one size
    rewards = rng.normal(size=60)
    algorithm = make_algorithm(AlgorithmConfig(normalize=normalize(std)))
    got = algorithm.advantages(rewards, groups)
    np.testing.assert_allclose(got, advantages_by_hand(rewards, groups, std), rtol=0, atol=1e-12)


@pytest.mark.parametrize("std", [False, True])
def test_equal_rewards_give_exactly_zero(std: bool) -> None:
    rewards = np.array([0.1, 0.1, 0.1, 1.0, 0.0, 7.3])  # 0.1 * 3 / 3 is not 0.1 in floating point
    got = make_algorithm(AlgorithmConfig(normalize=normalize(std))).advantages(
        rewards, np.array([0, 0, 0, 1, 1, 2])
    )
    assert got[:3].tolist() == [0, 0, 0]
    assert got[5] == 0
    assert (got[3:5] != 0).all()


def test_the_counts_say_what_was_clipped_and_corrected() -> None:
    config = AlgorithmConfig(correction="icepop")
    streams = random_streams(3)
    sums = make_algorithm(config).loss(inputs_of(streams)).sums
    on = streams["weights"] > 0
    ratio = np.exp(streams["logprobs"] - streams["old_logprobs"])[on]
    k = np.exp(streams["old_logprobs"] - streams["engine_logprobs"])[on]
    positive = streams["advantages"][on] > 0
    assert sums["clip_low_fraction"].item() == (~positive & (ratio < 0.8)).sum() > 0
    assert sums["clip_high_fraction"].item() == (positive & (ratio > 1.28)).sum() > 0
    assert sums["corrected_fraction"].item() == ((k < 0.5) | (k > 5.0)).sum() > 0


def test_tokens_on_which_the_engine_is_far_off_stay_finite() -> None:
    far = torch.tensor([-0.1, -0.1, -200.0])
    inputs = LossInputs(
        logprobs=far.clone().requires_grad_(),
        old_logprobs=far,
        engine_logprobs=torch.tensor([-9999.0, -0.1, -0.1]),
        advantages=torch.ones(3),
        weights=torch.ones(3),
        scale=torch.full((3,), 1 / 3),
        sequence=torch.tensor([0, 0, 1]),
        num_sequences=2,
    )
    outputs = make_algorithm(AlgorithmConfig(correction="icepop")).loss(inputs)
    outputs.loss.backward()
    assert inputs.logprobs.grad.tolist() == pytest.approx([0.0, -1 / 3, 0.0])
