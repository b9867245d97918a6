"""Clip-Cov and KL-Cov: which tokens they choose, by a transcription of the paper; what then happens to these (verl: integration)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from loss_streams import inputs_of, random_streams

from agl_ray.algorithms.algorithm import make_algorithm
from agl_ray.algorithms.base import Tokens
from agl_ray.config.algorithm import AlgorithmConfig
from agl_ray.config.load import validate
from agl_ray.types import ConfigError, InputError


def tokens(seed: int, size: int = 400) -> Tokens:
    rng = np.random.default_rng(seed)
    old = -rng.exponential(2.0, size)
    now = old + 0.3 * rng.normal(size=size)
    return Tokens(*(torch.tensor(x) for x in (now, old, rng.normal(size=size), rng.random(size))))


def covariances_by_hand(of: Tokens) -> list[float]:
    now, advantages = of.logprobs.tolist(), of.advantages.tolist()
    mean, centre = math.fsum(now) / len(now), math.fsum(advantages) / len(advantages)
    return [(a - centre) * (x - mean) for x, a in zip(now, advantages, strict=True)]


@pytest.mark.parametrize("share", [0.05, 1.0, 1e-6])
def test_clip_cov_draws_from_the_band_what_the_clip_leaves_alone(share: float) -> None:
    config = AlgorithmConfig(loss="clip_cov", cov_share=share, cov_low=0.5, cov_high=2.0)
    of = tokens(1)
    eligible = []
    for i, covariance in enumerate(covariances_by_hand(of)):
        r, a = math.exp(of.logprobs[i] - of.old_logprobs[i]), float(of.advantages[i])
        free = min(max(r, 0.8), 1.28) * a >= r * a
        if 0.5 < covariance < 2.0 and free:
            eligible.append(i)
    wanted = sorted(eligible, key=lambda i: float(of.draws[i]))[: max(1, int(share * 400))]
    chosen = make_algorithm(config).choose(of)
    assert torch.nonzero(chosen)[:, 0].tolist() == sorted(wanted)
    assert 0 < len(wanted) < 200


@pytest.mark.parametrize(("share", "number"), [(0.05, 20), (1e-6, 1)])
def test_kl_cov_takes_the_highest(share: float, number: int) -> None:
    of = tokens(2)
    by_hand = covariances_by_hand(of)
    ranked = sorted(range(400), key=lambda i: -by_hand[i])
    chosen = make_algorithm(AlgorithmConfig(loss="kl_cov", cov_share=share)).choose(of)
    assert torch.nonzero(chosen)[:, 0].tolist() == sorted(ranked[:number])


def test_no_tokens_at_all_and_none_in_the_band_choose_none() -> None:
    nothing = Tokens(*(torch.zeros(0, dtype=torch.float64) for _ in range(4)))
    for loss in ("clip_cov", "kl_cov"):
        assert make_algorithm(AlgorithmConfig(loss=loss)).choose(nothing).shape == (0,)
    config = AlgorithmConfig(loss="clip_cov", cov_low=900.0, cov_high=901.0)
    assert not make_algorithm(config).choose(tokens(3)).any()


def test_a_chosen_token_has_no_gradient_in_clip_cov_and_is_counted() -> None:
    streams = random_streams(4)
    inputs = inputs_of(streams)
    outputs = make_algorithm(AlgorithmConfig(loss="clip_cov")).loss(inputs)
    outputs.loss.backward()
    assert inputs.logprobs.grad is not None
    chosen = torch.tensor(streams["chosen"])
    assert chosen.any()
    assert not inputs.logprobs.grad[chosen].any()
    counted = float((streams["chosen"] & (streams["weights"] > 0)).sum())
    assert float(outputs.sums["cov_fraction"]) == counted


def test_every_token_counts_so_rows_without_advantage_are_run() -> None:
    assert not make_algorithm(AlgorithmConfig(loss="clip_cov")).skip_zero_advantage


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"algorithm": {"loss": "clip_cov", "cov_low": 9.0}}, "cov_low must be below"),
        ({"algorithm": {"name": "kl_cov"}}, "with learner.minibatches 1 nothing has"),
    ],
)
def test_a_switch_that_would_do_nothing_is_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate({"model": {"path": "m"}, **given})


def test_a_choice_of_another_shape_is_refused() -> None:
    algorithm = make_algorithm(AlgorithmConfig(loss="kl_cov"))
    algorithm._choice = lambda of, config: of.draws
    with pytest.raises(InputError, match=r"expected its `choose` to return bool \[400\]"):
        algorithm.choose(tokens(5))
