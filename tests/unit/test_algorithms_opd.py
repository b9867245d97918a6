"""On-policy distillation: the advantage and the loss against NumPy in float64, the gradient against that of the divergence itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from loss_streams import Streams, inputs_of, random_streams

from agl_ray.algorithms.algorithm import Algorithm, make_algorithm
from agl_ray.algorithms.base import LossInputs
from agl_ray.config.algorithm import AlgorithmConfig

V = 7


def algorithm(name: str = "opd", teacher: dict[str, Any] | None = None, **given: Any) -> Algorithm:
    of = {"base_url": "http://x/v1", "model": "m", **(teacher or {})}
    return make_algorithm(AlgorithmConfig.model_validate({"name": name, "teacher": of, **given}))


def taught_streams(seed: int) -> Streams:
    streams = random_streams(seed, rows=15 + seed, mismatch=0.3)
    chance = np.random.default_rng([seed, 1])
    streams["teacher_logprobs"] = -chance.exponential(2.5, len(streams["logprobs"]))
    return streams


def advantages_by_hand(streams: Streams, coefficient: float, bound: float) -> np.ndarray:
    toward = streams["teacher_logprobs"] - streams["old_logprobs"]
    return streams["advantages"] + coefficient * np.clip(toward, -bound, bound)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("coefficient", "bound"), [(1.0, 20.0), (0.3, 1.5)])
def test_the_advantage_of_every_token(seed: int, coefficient: float, bound: float) -> None:
    streams = taught_streams(seed)
    made = algorithm(teacher={"coefficient": coefficient, "bound": bound})
    inputs = inputs_of(streams)
    got = made.with_teacher(inputs).advantages
    wanted = advantages_by_hand(streams, coefficient, bound)
    np.testing.assert_allclose(got.numpy(), wanted, rtol=0, atol=1e-12)
    marks = made.teacher_marks(inputs)
    away = streams["old_logprobs"] - streams["teacher_logprobs"]
    np.testing.assert_allclose(marks["kl_teacher"].numpy(), away, rtol=0, atol=1e-12)
    assert int(marks["teacher_bounded_fraction"].sum()) == int((abs(away) > bound).sum())


@pytest.mark.parametrize("name", ["opd", "grpo", "decoupled_ppo"])
@pytest.mark.parametrize("seed", range(3))
def test_the_loss_with_the_clip(name: str, seed: int) -> None:
    streams = taught_streams(seed)
    made = algorithm(name, correction="importance", clip_low=0.1, clip_high=0.1)
    inputs = made.with_teacher(inputs_of(streams))
    advantages = advantages_by_hand(streams, 1.0, 20.0)
    ratio = np.exp(streams["logprobs"] - streams["old_logprobs"])
    k = np.exp(streams["old_logprobs"] - streams["engine_logprobs"])
    gain = np.minimum(ratio * advantages, np.clip(ratio, 0.9, 1.1) * advantages)
    wanted = -float((streams["weights"] * streams["scale"] * k * gain).sum())
    assert made.loss(inputs).loss.item() == pytest.approx(wanted, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("correction", ["none", "importance"])
def test_the_gradient_is_that_of_the_divergence(correction: str) -> None:
    """Over tokens sampled by the engine: every token of the vocabulary once, times its probability there."""
    chance = torch.Generator().manual_seed(3)
    drawn = torch.randn(3, V, dtype=torch.float64, generator=chance)
    logits, teacher = drawn[0].requires_grad_(), torch.log_softmax(drawn[1], -1)
    now = torch.log_softmax(logits, -1)
    engine = now.detach() if correction == "none" else torch.log_softmax(drawn[2], -1)
    inputs = LossInputs(
        logprobs=now,
        old_logprobs=now.detach(),
        engine_logprobs=engine,
        advantages=torch.zeros(V, dtype=torch.float64),
        weights=torch.ones(V, dtype=torch.float64),
        scale=engine.exp(),
        sequence=torch.arange(V),
        num_sequences=V,
        teacher_logprobs=teacher,
    )
    made = algorithm(correction=correction)
    (got,) = torch.autograd.grad(made.loss(made.with_teacher(inputs)).loss, logits)
    again = torch.log_softmax(logits, -1)
    (exact,) = torch.autograd.grad((again.exp() * (again - teacher)).sum(), logits)
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-12)


def test_without_a_teacher_nothing_changes_and_none_takes_nothing_from_rewards() -> None:
    plain, inputs = make_algorithm(AlgorithmConfig()), inputs_of(random_streams(1))
    assert plain.with_teacher(inputs) is inputs
    assert plain.teacher_marks(inputs) == {}
    rewards, groups = np.array([1.0, 0.0, 3.0]), np.array([0, 0, 1])
    assert algorithm().advantages(rewards, groups).tolist() == [0, 0, 0]
    assert algorithm("grpo").advantages(rewards, groups).tolist() == [0.5, -0.5, 0]
