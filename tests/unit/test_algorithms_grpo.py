"""GRPO against a transcription of its formulas in float64 NumPy, token by token."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from agl_ray.algorithms.base import LossInputs, make_algorithm
from agl_ray.algorithms.grpo import GRPO
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


@pytest.mark.parametrize("std", [False, True])
def test_advantages_of_ragged_groups(std: bool) -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 7, 60)  # neither sorted nor of one size
    rewards = rng.normal(size=60)
    algorithm = GRPO(AlgorithmConfig(std_normalize=std))
    got = algorithm.advantages(rewards, groups)
    np.testing.assert_allclose(got, advantages_by_hand(rewards, groups, std), rtol=0, atol=1e-12)


@pytest.mark.parametrize("std", [False, True])
def test_equal_rewards_give_exactly_zero(std: bool) -> None:
    rewards = np.array([0.1, 0.1, 0.1, 1.0, 0.0, 7.3])  # 0.1 * 3 / 3 is not 0.1 in floating point
    got = GRPO(AlgorithmConfig(std_normalize=std)).advantages(rewards, np.array([0, 0, 0, 1, 1, 2]))
    assert got[:3].tolist() == [0, 0, 0]
    assert got[5] == 0
    assert (got[3:5] != 0).all()


def loss_by_hand(
    streams: dict[str, np.ndarray], config: AlgorithmConfig, denominator: float
) -> float:
    total = 0.0
    for now, old, engine, advantage, weight in zip(*streams.values(), strict=True):
        ratio, k = math.exp(now - old), math.exp(old - engine)
        clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
        correction = 1.0
        if config.correction == "tis":
            correction = min(k, config.tis_cap)
        if config.correction == "icepop":
            correction = k if config.icepop_low <= k <= config.icepop_high else 0.0
        total -= weight * correction * min(ratio * advantage, clipped * advantage) / denominator
    return total


def random_streams(seed: int, size: int = 400) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    old = -rng.exponential(2.0, size)
    return {
        "logprobs": old + 0.3 * rng.normal(size=size),
        "old_logprobs": old,
        "engine_logprobs": old + 1.2 * rng.normal(size=size),
        "advantages": rng.normal(size=size),
        "weights": rng.integers(0, 2, size).astype(float),
    }


@pytest.mark.parametrize("correction", ["none", "tis", "icepop"])
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_gradient(correction: Any, seed: int) -> None:
    config = AlgorithmConfig(correction=correction)
    streams = random_streams(seed)
    expected = loss_by_hand(streams, config, 77.0)
    tensors = {name: torch.tensor(value, dtype=torch.float32) for name, value in streams.items()}
    tensors["logprobs"].requires_grad_()
    outputs = make_algorithm(config).loss(LossInputs(**tensors, denominator=77.0))
    assert abs(outputs.loss.item() - expected) <= 1e-6 * max(1.0, abs(expected))
    outputs.loss.backward()
    for index in range(0, 400, 37):  # the gradient by central differences of the transcription
        moved = []
        for sign in (1, -1):
            bumped = {**streams, "logprobs": streams["logprobs"].copy()}
            bumped["logprobs"][index] += sign * 1e-6
            moved.append(loss_by_hand(bumped, config, 77.0))
        slope = (moved[0] - moved[1]) / 2e-6
        assert abs(tensors["logprobs"].grad[index].item() - slope) <= 1e-6


def test_the_counts_say_what_was_clipped_and_corrected() -> None:
    config = AlgorithmConfig(correction="icepop")
    streams = random_streams(3)
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in streams.items()}
    sums = make_algorithm(config).loss(LossInputs(**tensors, denominator=1.0)).sums
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
        denominator=3.0,
    )
    outputs = make_algorithm(AlgorithmConfig(correction="icepop")).loss(inputs)
    outputs.loss.backward()
    assert inputs.logprobs.grad.tolist() == pytest.approx([0.0, -1 / 3, 0.0])
