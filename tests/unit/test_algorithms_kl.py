"""The KL term: values, and its gradient against the exact one, the expectation taken over a whole small vocabulary."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from loss_streams import inputs_of, random_streams

from agl_ray.algorithms.algorithm import make_algorithm
from agl_ray.algorithms.base import LossInputs
from agl_ray.algorithms.kl import estimate, loss_term
from agl_ray.config.algorithm import AlgorithmConfig
from agl_ray.config.kl import Estimator, KLConfig

V = 7
ESTIMATORS: tuple[Estimator, ...] = ("k1", "k2", "k3")


def three_policies(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of the policy (with gradient), of the one that sampled, of the reference; float64 [V]."""
    drawn = torch.randn(3, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return drawn[0].requires_grad_(), drawn[1], drawn[2]


def exact_gradient(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    now = torch.log_softmax(logits, -1)
    divergence = (now.exp() * (now - torch.log_softmax(reference, -1))).sum()
    return torch.autograd.grad(divergence, logits)[0]


def expected_gradient(
    logits: torch.Tensor, sampler: torch.Tensor, reference: torch.Tensor, config: KLConfig
) -> torch.Tensor:
    """Of the term, over tokens sampled by `sampler`: every token of the vocabulary once, times its probability there."""
    now, old = torch.log_softmax(logits, -1), torch.log_softmax(sampler, -1)
    ones = torch.ones(V, dtype=torch.float64)
    inputs = LossInputs(
        logprobs=now,
        old_logprobs=old,
        engine_logprobs=old,
        advantages=ones,
        weights=ones,
        scale=ones,
        sequence=torch.arange(V),
        num_sequences=V,
        reference_logprobs=torch.log_softmax(reference, -1),
    )
    return torch.autograd.grad((old.exp() * loss_term(inputs, ones, config)).sum(), logits)[0]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_weighted_terms_have_the_gradient_of_the_divergence(estimator: Estimator) -> None:
    logits, sampler, reference = three_policies(1)
    config = KLConfig(coefficient=1.0, estimator=estimator)
    got = expected_gradient(logits, sampler, reference, config)
    torch.testing.assert_close(got, exact_gradient(logits, reference), rtol=0, atol=1e-12)


def test_without_weights_k2_is_right_on_policy_only_and_k3_never() -> None:
    logits, sampler, reference = three_policies(2)
    exact = exact_gradient(logits, reference)
    for estimator, right in (("k2", True), ("k3", False)):
        config = KLConfig(coefficient=1.0, estimator=estimator, weighted=False)
        on_policy = expected_gradient(logits, logits.detach(), reference, config)
        assert torch.allclose(on_policy, exact, atol=1e-12) == right
        off_policy = expected_gradient(logits, sampler, reference, config)
        assert not torch.allclose(off_policy, exact, atol=1e-3)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_k1_and_k3_are_the_divergence_on_average_and_k2_nearly(estimator: Estimator) -> None:
    logits, _, reference = three_policies(3)
    now = torch.log_softmax(logits.detach(), -1)
    other = torch.log_softmax(logits.detach() + 0.1 * reference, -1)
    divergence = (now.exp() * (now - other)).sum().item()
    mean = (now.exp() * estimate(now, other, estimator)).sum().item()
    assert mean == pytest.approx(divergence, rel=0.2 if estimator == "k2" else 1e-9)


def test_one_impossible_token_does_not_make_k3_infinite() -> None:
    value = estimate(torch.tensor([-300.0]), torch.tensor([-0.1]), "k3")
    assert value.item() == pytest.approx(math.expm1(20) - 20)


@pytest.mark.parametrize("weighted", [True, False])
def test_the_term_has_the_scale_and_the_weights_of_the_policy_loss(weighted: bool) -> None:
    streams = random_streams(5)
    plain = AlgorithmConfig.model_validate({"correction": "tis"})
    kl = {"coefficient": 0.3, "estimator": "k2", "weighted": weighted}
    config = AlgorithmConfig.model_validate({"correction": "tis", "kl": kl})
    streams["reference_logprobs"] = streams["logprobs"] - 0.4 * np.sin(streams["scale"] * 9)
    without = make_algorithm(plain).loss(inputs_of(streams)).loss.item()
    expected = 0.0
    for i in range(len(streams["logprobs"])):
        away = streams["logprobs"][i] - streams["reference_logprobs"][i]
        k = min(math.exp(streams["old_logprobs"][i] - streams["engine_logprobs"][i]), 2.0)
        r = math.exp(streams["logprobs"][i] - streams["old_logprobs"][i])
        weight = streams["weights"][i] * streams["scale"][i] * (k * r if weighted else 1.0)
        expected += 0.3 * weight * away**2 / 2
    got = make_algorithm(config).loss(inputs_of(streams)).loss.item()
    assert got - without == pytest.approx(expected, rel=1e-9)


def test_rows_without_advantage_are_needed_where_the_divergence_acts() -> None:
    for kl, late, skip in (
        ({}, False, True),
        ({"coefficient": 0.0}, False, True),
        ({"coefficient": 0.1}, False, False),
        ({"coefficient": 0.1, "where": "reward"}, True, False),
    ):
        algorithm = make_algorithm(AlgorithmConfig.model_validate({"kl": kl}))
        assert (algorithm.late_advantages, algorithm.skip_zero_advantage) == (late, skip)
