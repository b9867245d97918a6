"""GMPO (arXiv 2507.20673): the geometric mean of clipped token ratios.

    gain = A exp(mean_t c_t),   c_t = log r_t clipped where it moves with A: max(log r, -clip_low) if A < 0, min(log r, clip_high) if A >= 0

The bounds are of log r (the paper's are e^-0.4 and e^0.4). Every token of a sequence has the gain of the sequence, so the aggregation that
the paper means is seq-mean-token-mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agl_ray.algorithms.base import Gain, LossInputs
from agl_ray.algorithms.registry import policy_loss

if TYPE_CHECKING:
    from agl_ray.config.algorithm import AlgorithmConfig


@policy_loss("gmpo", reads=("clip_low", "clip_high"))
def gmpo(inputs: LossInputs, config: AlgorithmConfig) -> Gain:
    """The gain of the token's sequence [T]. Marks: clip_low_fraction, clip_high_fraction, ratio_mean."""
    import torch

    log_ratio = inputs.logprobs - inputs.old_logprobs
    up = inputs.advantages >= 0
    bounded = torch.where(
        up, log_ratio.clamp(max=config.clip_high), log_ratio.clamp(min=-config.clip_low)
    )
    ratio = torch.exp(inputs.over_sequences(bounded, mean=True))[inputs.sequence]
    return Gain(
        ratio * inputs.advantages,
        {
            "clip_low_fraction": (log_ratio < -config.clip_low) & ~up,
            "clip_high_fraction": (log_ratio > config.clip_high) & (inputs.advantages > 0),
            "ratio_mean": torch.exp(log_ratio.detach()),
        },
    )
