"""SAPO (arXiv 2511.20347): a soft gate in place of the clip.

    gain_t = 4 / tau sigmoid(tau (r_t - 1)) A,   tau = sapo_tau_positive where A > 0, else sapo_tau_negative

At r = 1 its slope is that of r A; it fades as r moves away, faster for negative advantages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agl_ray.algorithms.base import Gain, LossInputs
from agl_ray.algorithms.registry import policy_loss

if TYPE_CHECKING:
    from agl_ray.config.algorithm import AlgorithmConfig


@policy_loss("sapo", reads=("sapo_tau_positive", "sapo_tau_negative"))
def sapo(inputs: LossInputs, config: AlgorithmConfig) -> Gain:
    """The gated gain [T]. Mark: ratio_mean."""
    import torch

    ratio = torch.exp(inputs.logprobs - inputs.old_logprobs)
    up, down = ratio.new_tensor([config.sapo_tau_positive, config.sapo_tau_negative])
    tau = torch.where(inputs.advantages > 0, up, down)
    gate = torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    return Gain(gate * inputs.advantages, {"ratio_mean": ratio.detach()})
