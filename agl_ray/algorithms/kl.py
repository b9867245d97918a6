"""KL divergence from a reference model, from sampled tokens. `algorithm.kl`; l = log pi - log reference of the token.

    k1 = l            unbiased, may be negative
    k2 = l^2 / 2      biased as a value
    k3 = exp(-l) + l - 1   unbiased, never negative        (Schulman 2020, joschu.net/blog/kl-approx.html)

What counts is the gradient, not the value. That of KL(pi || reference) is E[l grad log pi], and which form has it was shown by
arXiv 2510.01555: k1 in the reward, k2 in the loss. As GRPO (2402.03300) writes it, k3 in the loss without weights, the gradient is
E[(1 - exp(-l)) grad log pi], right to first order only: weak where the policy has left the reference far behind. k1 in the
loss without weights has the gradient E[grad log pi] = 0.

In the loss    + coefficient sum_t scale_t v_t k_t,   v = w pi / pi_old  (w: correction.py, so v = pi / mu; `weighted: false`: v = 1)

The tokens were sampled by mu, not by pi, hence v (2510.01555, section on off-policy data). For k2 it is a constant; for k1
and k3 the gradient flows through pi / pi_old too, which is what makes theirs right (k3: DeepSeek-V3.2, 2512.02556). The gradients of the weighted
k2 and k3 are equal. A token answers for its own divergence only.

In the reward    R_u <- R_u - coefficient sum_{t in u} k_t      under pi_old, before the advantages

u: a unit of credit. So the group's baseline, its standard deviation and everything else see the penalised reward (RLHF's form, 1909.08593;
RLOO's, 2402.14740, with the sum over the response). With a critic (`advantage: gae`) each token's is taken off its own reward, R_t <- R_t -
coefficient k_t. Only tokens that are trained count: a row dropped as overlong adds nothing.

Called by algorithms/algorithm.py, learner/reference.py and learner/critic.py. Test alone: tests/unit/test_algorithms_kl.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agl_ray.algorithms.base import LossInputs

if TYPE_CHECKING:
    import torch

    from agl_ray.config.kl import Estimator, KLConfig

LARGEST = 20.0  # of -l in k3: a single token must not make the loss infinite


def estimate(logprobs: torch.Tensor, reference: torch.Tensor, estimator: Estimator) -> torch.Tensor:
    """KL(p || reference) per token [T] in nats, of tokens sampled by p, from its `logprobs` [T] and the reference's."""
    import torch

    log_ratio = logprobs - reference
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    back = (-log_ratio).clamp(-LARGEST, LARGEST)
    return torch.expm1(back) - back


def loss_term(inputs: LossInputs, weight: torch.Tensor, config: KLConfig) -> torch.Tensor:
    """What a token adds to the loss [T], without coefficient and scale. weight: of `correction` [T]."""
    import torch

    if inputs.reference_logprobs is None:
        raise ValueError("LossInputs.reference_logprobs: expected a stream, got none")
    term = estimate(inputs.logprobs, inputs.reference_logprobs, config.estimate)
    if not config.weighted:
        return term
    ratio = torch.exp(inputs.logprobs - inputs.old_logprobs)
    if config.estimate == "k2":
        ratio = ratio.detach()
    return weight * ratio * term
