"""DPPO (arXiv 2602.04879): a token is masked when the policy has moved too far from the one that sampled it, in the direction of A.

    gain_t = m_t rho_t A,   rho = pi / mu,   m_t = 0 where (pi - mu) sign(A) > dppo_bound (total variation of the sampled token), else 1

The ratio is taken against the engine's own probabilities mu, so the learner/engine mismatch is inside it and `correction` is none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agl_ray.algorithms.base import Gain, LossInputs
from agl_ray.algorithms.registry import policy_loss

if TYPE_CHECKING:
    from agl_ray.config.algorithm import AlgorithmConfig


@policy_loss("dppo", reads=("dppo_bound",))
def dppo(inputs: LossInputs, config: AlgorithmConfig) -> Gain:
    """The masked gain [T]. Marks: masked_fraction, ratio_mean (pi / mu)."""
    import torch

    ratio = torch.exp(inputs.logprobs - inputs.engine_logprobs)
    with torch.no_grad():
        moved = torch.exp(inputs.logprobs) - torch.exp(inputs.engine_logprobs)
        masked = moved * torch.sign(inputs.advantages) > config.dppo_bound
    gain = torch.where(masked, 0.0, ratio * inputs.advantages)
    return Gain(gain, {"masked_fraction": masked, "ratio_mean": ratio.detach()})
