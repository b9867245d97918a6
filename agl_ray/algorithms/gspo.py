"""GSPO (arXiv 2507.18071): one ratio per sequence, clipped as a whole.

    s = exp(mean_t log r_t),   s_t = sg(s) pi_t / sg(pi_t),   gain_t = min(s_t A, clip(s_t, 1 - clip_low, 1 + clip_high) A)

The gradient reaches every token of a sequence alike. A sequence is a row: what one conversation's calls were merged into.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agl_ray.algorithms.base import Gain, LossInputs
from agl_ray.algorithms.registry import policy_loss

if TYPE_CHECKING:
    from agl_ray.config.algorithm import AlgorithmConfig


@policy_loss("gspo", reads=("clip_low", "clip_high"))
def gspo(inputs: LossInputs, config: AlgorithmConfig) -> Gain:
    """The sequence-clipped gain [T]. Marks: clip_low_fraction, clip_high_fraction, ratio_mean."""
    import torch

    low, high = 1 - config.clip_low, 1 + config.clip_high
    log_ratio = inputs.logprobs - inputs.old_logprobs
    of_sequence = inputs.over_sequences(log_ratio.detach(), mean=True)[inputs.sequence]
    ratio = torch.exp(of_sequence + inputs.logprobs - inputs.logprobs.detach())
    gain = torch.minimum(ratio * inputs.advantages, ratio.clamp(low, high) * inputs.advantages)
    return Gain(
        gain,
        {
            "clip_low_fraction": (ratio < low) & (inputs.advantages < 0),
            "clip_high_fraction": (ratio > high) & (inputs.advantages > 0),
            "ratio_mean": ratio.detach(),
        },
    )
