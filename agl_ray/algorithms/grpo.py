"""GRPO: the mean reward of the rollouts of one row is the baseline; clipped policy gradient, mean over all tokens.

    A_i = R_i - mean_G(R)                       (with std_normalize: divided by std_G(R) + 1e-6)
    r   = pi / pi_old,   k = pi_old / mu
    loss = - sum_t w(k_t) min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A) / number of tokens of the whole batch

GRPO is arXiv 2402.03300. Different here, each a known repair: no division by the standard deviation (Dr.GRPO, 2503.20783),
clip-higher and the token mean over the whole batch (DAPO, 2503.14476), a weight w(k) for tokens on which learner and engine
disagree: `tis` min(k, tis_cap) (Yao et al. 2025, "Off-policy RL"), `icepop` k inside [icepop_low, icepop_high], else 0
(2510.18855), `none` 1. No KL term. A group of equal rewards has advantages of exactly 0.
Called through algorithms/base.py. Test it alone with tests/unit/test_algorithms_grpo.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from agl_ray.algorithms.base import LossInputs, LossOutputs

if TYPE_CHECKING:
    import torch

    from agl_ray.config.models import AlgorithmConfig


class GRPO:
    skip_zero_advantage = True

    def __init__(self, config: AlgorithmConfig) -> None:
        self.config = config

    def advantages(self, rewards: npt.NDArray, group_index: npt.NDArray) -> npt.NDArray:
        """See base.Algorithm. Groups may be of any size from 1; a group of 1 has advantage 0."""
        rewards = np.asarray(rewards, np.float64)
        _, group = np.unique(group_index, return_inverse=True)
        counts = np.bincount(group)
        centred = rewards - (np.bincount(group, weights=rewards) / counts)[group]
        high, low = np.full(len(counts), -np.inf), np.full(len(counts), np.inf)
        np.maximum.at(high, group, rewards)
        np.minimum.at(low, group, rewards)
        centred[(high == low)[group]] = 0.0  # not the rounding error of the mean
        if self.config.std_normalize:
            deviation = np.sqrt(np.bincount(group, weights=centred**2) / counts)
            centred = centred / (deviation[group] + 1e-6)
        return centred

    def loss(self, inputs: LossInputs) -> LossOutputs:
        """See base.Algorithm. sums: clip_low_fraction, clip_high_fraction, corrected_fraction, ratio_mean."""
        import torch

        low, high = 1 - self.config.clip_low, 1 + self.config.clip_high
        ratio = torch.exp(inputs.logprobs - inputs.old_logprobs)
        gain = torch.minimum(ratio * inputs.advantages, ratio.clamp(low, high) * inputs.advantages)
        correction = self._correction(torch.exp(inputs.old_logprobs - inputs.engine_logprobs))
        counted = inputs.weights
        with torch.no_grad():
            sums = {
                "clip_low_fraction": (counted * (ratio < low) * (inputs.advantages < 0)).sum(),
                "clip_high_fraction": (counted * (ratio > high) * (inputs.advantages > 0)).sum(),
                "corrected_fraction": (counted * self._cut(inputs)).sum(),
                "ratio_mean": (counted * ratio).sum(),
            }
        return LossOutputs(-(counted * correction * gain).sum() / inputs.denominator, sums)

    def _correction(self, k: torch.Tensor) -> torch.Tensor:
        import torch

        config = self.config
        if config.correction == "tis":
            return k.clamp(max=config.tis_cap)
        if config.correction == "icepop":
            return torch.where((k >= config.icepop_low) & (k <= config.icepop_high), k, 0.0)
        return torch.ones_like(k)

    def _cut(self, inputs: LossInputs) -> torch.Tensor:
        """Where the correction does more than weigh by k: TIS capped, IcePop dropped the token."""
        import torch

        k, config = torch.exp(inputs.old_logprobs - inputs.engine_logprobs), self.config
        if config.correction == "tis":
            return k > config.tis_cap
        if config.correction == "icepop":
            return (k < config.icepop_low) | (k > config.icepop_high)
        return torch.zeros_like(k)
