"""GRPO: the mean reward of the rollouts of one row is the baseline; PPO's clipped gain.

    A_i = R_i - mean_G(R)
    gain_t = min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A),   r = pi / pi_old

GRPO is arXiv 2402.03300, the clip PPO's (1707.06347). Our defaults repair what is known to go wrong: no division by the standard
deviation (`normalize: group` brings it back; Dr.GRPO, 2503.20783), clip-higher and the token mean over the whole batch (DAPO,
2503.14476). `dual_clip` c bounds the gain from below by c A where A < 0 (1912.09729). A group of equal rewards has advantages of exactly 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from agl_ray.algorithms.base import AdvantageInputs, Gain, LossInputs
from agl_ray.algorithms.registry import advantage, policy_loss

if TYPE_CHECKING:
    from agl_ray.config.algorithm import AlgorithmConfig

CLIPS = ("clip_low", "clip_high", "dual_clip")
"""Switches of the clipped gain."""


@advantage("group", reads=())
def group(inputs: AdvantageInputs, config: AlgorithmConfig) -> npt.NDArray:
    """R - mean of the group [M]."""
    counts = np.bincount(inputs.group)
    means = np.bincount(inputs.group, weights=inputs.rewards) / counts
    return inputs.rewards - means[inputs.group]


@advantage("reward", baseline="other", reads=())
def reward(inputs: AdvantageInputs, config: AlgorithmConfig) -> npt.NDArray:
    """R itself [M]: REINFORCE++ (arXiv 2501.03262) whitens it over the batch (`normalize: batch`)."""
    return inputs.rewards.copy()


@policy_loss("clip", reads=CLIPS)
def clip(inputs: LossInputs, config: AlgorithmConfig) -> Gain:
    """PPO's clipped gain [T]. Marks: clip_low_fraction, clip_high_fraction, ratio_mean."""
    import torch

    low, high = 1 - config.clip_low, 1 + config.clip_high
    ratio = torch.exp(inputs.logprobs - inputs.old_logprobs)
    gain = torch.minimum(ratio * inputs.advantages, ratio.clamp(low, high) * inputs.advantages)
    if config.dual_clip is not None:
        floor = config.dual_clip * inputs.advantages
        gain = torch.where(inputs.advantages < 0, torch.maximum(gain, floor), gain)
    return Gain(
        gain,
        {
            "clip_low_fraction": (ratio < low) & (inputs.advantages < 0),
            "clip_high_fraction": (ratio > high) & (inputs.advantages > 0),
            "ratio_mean": ratio.detach(),
        },
    )
