"""CISPO (arXiv 2506.13585): REINFORCE with the clipped ratio as a constant weight; no token loses its gradient.

    gain_t = sg(clip(r_t, 1 - clip_low, 1 + clip_high)) A log pi_t

The preset's bounds are 0 and 5 (ScaleRL, 2510.13786).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agl_ray.algorithms.base import Gain, LossInputs
from agl_ray.algorithms.registry import policy_loss

if TYPE_CHECKING:
    from agl_ray.config.algorithm import AlgorithmConfig


@policy_loss("cispo", reads=("clip_low", "clip_high"))
def cispo(inputs: LossInputs, config: AlgorithmConfig) -> Gain:
    """The gain [T]. Marks: clip_low_fraction, clip_high_fraction (whatever the sign of A), ratio_mean."""
    import torch

    low, high = 1 - config.clip_low, 1 + config.clip_high
    ratio = torch.exp(inputs.logprobs - inputs.old_logprobs).detach()
    gain = ratio.clamp(low, high) * inputs.advantages * inputs.logprobs
    marks = {
        "clip_low_fraction": ratio < low,
        "clip_high_fraction": ratio > high,
        "ratio_mean": ratio,
    }
    return Gain(gain, marks)
