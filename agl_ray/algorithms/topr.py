"""TOPR (arXiv 2503.14286): positive rollouts unweighted, negative ones by their ratio cut to [0, 1].

gain_t = c A log pi_t,   c = 1 where A > 0, else sg(clip(prod_t pi / mu, 0, 1)) of the token's sequence
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agl_ray.algorithms.base import Gain, LossInputs
from agl_ray.algorithms.registry import policy_loss

if TYPE_CHECKING:
    from agl_ray.config.algorithm import AlgorithmConfig


@policy_loss("topr", reads=())
def topr(inputs: LossInputs, config: AlgorithmConfig) -> Gain:
    """The tapered gain [T]. Mark: ratio_mean (pi / mu of the sequence, cut)."""
    import torch

    log_ratio = (inputs.logprobs - inputs.engine_logprobs).detach()
    cut = torch.exp(inputs.over_sequences(log_ratio, mean=False).clamp(max=0.0))[inputs.sequence]
    weight = torch.where(inputs.advantages > 0, 1.0, cut)
    return Gain(weight * inputs.advantages * inputs.logprobs, {"ratio_mean": cut})
