"""GAE and the value loss against transcriptions token by token; where episodes begin, end and are paid."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from agl_ray.algorithms.algorithm import make_algorithm
from agl_ray.algorithms.base import Episodes
from agl_ray.algorithms.gae import TokenPlaces, discounted_sums, lay_episodes
from agl_ray.algorithms.ppo import ValueInputs, value_loss
from agl_ray.config.algorithm import AlgorithmConfig
from agl_ray.types import ConfigError, InputError


def random_episodes(seed: int, most: int = 40) -> tuple[Episodes, np.ndarray]:
    """Ragged episodes with rewards at any token, and values."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, most, 23)
    size = int(lengths.sum())
    rewards = rng.normal(size=size) * (rng.random(size) < 0.3)
    return Episodes(rewards, lengths), rng.normal(size=size)


def by_hand(
    episodes: Episodes, values: np.ndarray, gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    advantages = [0.0] * len(values)
    start = 0
    for length in episodes.lengths.tolist():
        after, advantage = 0.0, 0.0
        for t in reversed(range(start, start + length)):
            delta = float(episodes.rewards[t]) + gamma * after - float(values[t])
            advantages[t] = advantage = delta + gamma * lam * advantage
            after = float(values[t])
        start += length
    return advantages, [a + float(v) for a, v in zip(advantages, values, strict=True)]


def ppo(**switches: Any) -> Any:
    config = {"advantage": "gae", "normalize": "none", **switches}
    return make_algorithm(AlgorithmConfig.model_validate(config))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (0.97, 0.0)])
def test_gae_of_ragged_episodes(seed: int, gamma: float, lam: float) -> None:
    episodes, values = random_episodes(seed)
    got = ppo(gae_gamma=gamma, gae_lambda=lam).critic_advantages(episodes, values)
    advantages, returns = by_hand(episodes, values, gamma, lam)
    np.testing.assert_allclose(got.advantages, advantages, rtol=0, atol=1e-12)
    np.testing.assert_allclose(got.returns, returns, rtol=0, atol=1e-12)


def test_the_returns_may_have_a_lambda_of_their_own() -> None:
    episodes, values = random_episodes(3)
    got = ppo(gae_lambda=0.9, gae_return_lambda=1.0).critic_advantages(episodes, values)
    np.testing.assert_allclose(
        got.advantages, by_hand(episodes, values, 1.0, 0.9)[0], rtol=0, atol=1e-12
    )
    to_go = discounted_sums(episodes.rewards, episodes.lengths, 1.0)  # nothing of the critic
    np.testing.assert_allclose(got.returns, to_go, rtol=0, atol=1e-12)


def test_whitening_is_over_all_tokens_and_leaves_the_returns() -> None:
    episodes, values = random_episodes(4)
    plain = ppo().critic_advantages(episodes, values)
    white = ppo(normalize="batch").critic_advantages(episodes, values)
    assert (white.advantages.mean(), white.advantages.std()) == pytest.approx((0, 1), abs=1e-5)
    assert np.corrcoef(white.advantages, plain.advantages)[0, 1] == pytest.approx(1)
    np.testing.assert_array_equal(white.returns, plain.returns)


def test_a_long_episode_takes_a_few_passes() -> None:
    values = np.ones(100_001)
    sums = discounted_sums(values, np.array([100_000, 1]), 1.0)
    assert (sums[0], sums[99_999], sums[100_000]) == (100_000, 1, 1)


def test_nothing_trained_is_no_episode() -> None:
    none = np.zeros(0, np.int64)
    places = TokenPlaces(none, none, none, np.array([0]), np.array([-1]))
    episodes, index = lay_episodes(places, np.array([1.0]))
    assert (len(episodes.lengths), len(index)) == (0, 0)
    assert len(ppo().critic_advantages(episodes, np.zeros(0)).advantages) == 0


def test_tokens_stand_in_the_order_of_their_calls_and_units_are_paid_at_their_end() -> None:
    # Episode 0: call 1 (two tokens in one row, its third in another), call 4. Episode 1: call 2. Unit 3 lost its tokens: paid at call 1.
    places = TokenPlaces(
        line=np.array([0, 1, 0, 0, 1, 0]),
        call=np.array([4, 2, 1, 1, 2, 1]),
        at=np.array([9, 3, 5, 7, 2, 6]),
        unit_line=np.array([0, 1, 0, 0, 1]),
        unit_call=np.array([1, 2, 4, 3, 0]),  # unit 4's only call came before any trained token
    )
    episodes, index = lay_episodes(places, np.array([1.0, 10.0, 100.0, 1000.0, 5.0]))
    assert episodes.lengths.tolist() == [4, 2]
    assert index.tolist() == [3, 5, 0, 2, 4, 1]
    assert episodes.rewards.tolist() == [0, 0, 1001, 100, 0, 10]


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_value_loss_is_the_formula(clip: float | None) -> None:
    rng = np.random.default_rng(5)
    values, old, returns = (rng.normal(size=50) for _ in range(3))
    weights, scale = (rng.random(50) < 0.7).astype(float), rng.random(50)
    at = torch.tensor(values, requires_grad=True)
    streams = (torch.tensor(stream) for stream in (old, returns, weights, scale))
    loss, clipped = value_loss(ValueInputs(at, *streams), clip)
    loss.backward()
    assert at.grad is not None
    errors, slopes, cut = (values - returns) ** 2, values - returns, np.zeros(50, bool)
    if clip is not None:
        inside = np.clip(values, old - clip, old + clip)
        cut = (inside - returns) ** 2 > errors
        errors = np.maximum(errors, (inside - returns) ** 2)
        slopes = np.where(cut, (inside - returns) * (inside == values), slopes)
        assert cut.any()
    assert loss.item() == pytest.approx(0.5 * (weights * scale * errors).sum(), abs=1e-12)
    np.testing.assert_allclose(at.grad, weights * scale * slopes, rtol=0, atol=1e-12)
    assert clipped.tolist() == cut.tolist()


def test_a_critic_that_diverges_is_an_error_not_a_step() -> None:
    episodes, values = random_episodes(6)
    with pytest.raises(InputError, match=r"algorithm\.advantage gae: expected .* not finite"):
        ppo().critic_advantages(episodes, values * np.nan)
    with pytest.raises(ConfigError, match="group has no critic"):
        make_algorithm(AlgorithmConfig()).critic_advantages(episodes, values)
