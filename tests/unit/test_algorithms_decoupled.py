"""Decoupled PPO (arXiv 2505.24298) and PPO as it was before, against NumPy in float64; where the switch makes no sense it is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from loss_streams import Streams, inputs_of, random_streams

from agl_ray.algorithms.algorithm import make_algorithm
from agl_ray.config.algorithm import AlgorithmConfig
from agl_ray.config.load import validate
from agl_ray.types import ConfigError

CLIP = {"clip_low": 0.2, "clip_high": 0.2}


def algorithm_config(**given: Any) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate({**CLIP, **given})


def objective(streams: Streams, proximal: str) -> float:
    """AReaL's equation: sum_t (pi_prox / mu) min(u A, clip(u) A), u = pi / pi_prox; pi_prox = mu is PPO's own."""
    now, behave, against = (
        streams[name] for name in ("logprobs", "engine_logprobs", proximal + "_logprobs")
    )
    u, outside = np.exp(now - against), np.exp(against - behave)
    advantages = streams["advantages"]
    gain = np.minimum(u * advantages, np.clip(u, 0.8, 1.2) * advantages)
    return float((streams["weights"] * streams["scale"] * outside * gain).sum())


def slope(streams: Streams, proximal: str, index: int) -> float:
    moved = []
    for step in (1e-6, -1e-6):
        logprobs = streams["logprobs"].copy()
        logprobs[index] += step
        moved.append(objective({**streams, "logprobs": logprobs}, proximal))
    return (moved[0] - moved[1]) / 2e-6


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("proximal", "given"),
    [
        ("old", {"correction": "importance"}),
        ("old", {"name": "decoupled_ppo"}),
        ("engine", {"proximal": "engine", "correction": "none"}),
    ],
)
def test_loss_and_gradient(proximal: str, given: dict[str, Any], seed: int) -> None:
    streams = random_streams(seed, rows=20 + seed, spread=0.5, mismatch=0.4)
    inputs = inputs_of(streams)
    made = make_algorithm(algorithm_config(**given)).loss(inputs)
    assert made.loss.item() == pytest.approx(-objective(streams, proximal), rel=1e-9, abs=1e-9)
    made.loss.backward()
    assert inputs.logprobs.grad is not None
    for index in range(0, len(streams["logprobs"]), 17):
        by_hand = -slope(streams, proximal, index)
        assert inputs.logprobs.grad[index].item() == pytest.approx(by_hand, rel=1e-5, abs=1e-6)


def test_they_are_the_same_where_learner_and_engine_agree_and_differ_elsewhere() -> None:
    decoupled = make_algorithm(algorithm_config(correction="importance"))
    coupled = make_algorithm(algorithm_config(proximal="engine", correction="none"))
    streams = random_streams(7, mismatch=0.0)
    one, other = (made.loss(inputs_of(streams)).loss.item() for made in (decoupled, coupled))
    assert one == pytest.approx(other, rel=1e-12)
    stale = random_streams(7, mismatch=1.0)
    one, other = (made.loss(inputs_of(stale)).loss.item() for made in (decoupled, coupled))
    assert abs(one - other) > 0.1


def test_the_clip_of_the_coupled_form_acts_without_an_update() -> None:
    streams = random_streams(8, spread=0.0)  # pi is pi_old
    coupled = make_algorithm(algorithm_config(proximal="engine", correction="none"))
    decoupled = make_algorithm(algorithm_config(correction="importance"))
    names = ("clip_low_fraction", "clip_high_fraction")
    assert all(coupled.loss(inputs_of(streams)).sums[name] > 1 for name in names)
    assert all(decoupled.loss(inputs_of(streams)).sums[name] == 0 for name in names)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"proximal": "engine"}, "nothing is left for algorithm.correction icepop"),
        (
            {"proximal": "engine", "name": "decoupled_ppo"},
            "nothing is left for algorithm.correction importance",
        ),
        ({"proximal": "engine", "name": "dppo"}, "algorithm.loss dppo takes its ratio against"),
        ({"correction": "importance", "name": "topr"}, "algorithm.correction importance: .*topr"),
        ({"correction": "importance", "tis_cap": 3.0}, "tis_cap acts with correction: tis"),
    ],
)
def test_what_makes_no_sense_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate({"model": {"path": "m"}, "algorithm": given})
