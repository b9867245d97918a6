"""KL-Cov (arXiv 2505.22617): the tokens of the highest covariance are held near the policy at the start of the batch.

    gain_t = r_t A - kl_cov_coefficient |log r_t|   for the `cov_share` of the update's tokens with the highest Cov(t)
             r_t A                                  for the others; r = pi / pi_old, not clipped

Cov: covariance.py, of the policy now, so each update costs one more forward pass. Where pi is pi_old the penalty has no gradient: it
acts from a batch's second update on, and a run with `learner.minibatches` 1 is refused. The authors use a share of 2e-3 for 7B models, 2e-4 for 32B.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agl_ray.algorithms.base import Gain, LossInputs, Tokens
from agl_ray.algorithms.covariance import covariances, number_chosen
from agl_ray.algorithms.registry import policy_loss

if TYPE_CHECKING:
    import torch

    from agl_ray.config.algorithm import AlgorithmConfig


def highest(tokens: Tokens, config: AlgorithmConfig) -> torch.Tensor:
    """bool [K]: which tokens are penalised."""
    import torch

    covariance = covariances(tokens)
    chosen = torch.zeros_like(covariance, dtype=torch.bool)
    number = min(number_chosen(tokens, config.cov_share), len(covariance))
    chosen[torch.topk(covariance, number).indices] = True
    return chosen


@policy_loss("kl_cov", choose=highest, reads=("cov_share", "kl_cov_coefficient"))
def kl_cov(inputs: LossInputs, config: AlgorithmConfig) -> Gain:
    """The gain [T]. Marks: cov_fraction (share of the tokens that are penalised), ratio_mean."""
    import torch

    log_ratio = inputs.logprobs - inputs.old_logprobs
    ratio = torch.exp(log_ratio)
    chosen = inputs.chosen_tokens()
    penalty = torch.where(chosen, config.kl_cov_coefficient * log_ratio.abs(), 0.0)
    gain = ratio * inputs.advantages - penalty
    return Gain(gain, {"ratio_mean": ratio.detach(), "cov_fraction": chosen})
