"""MaxRL (arXiv 2602.02710): the group's deviation relative to its mean, so that rare successes weigh more.

A_i = (R_i - mean_G(R)) / mean_G(R);   0 where the mean is 0 (nothing succeeded). For rewards that are not negative.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from agl_ray.algorithms.base import AdvantageInputs
from agl_ray.algorithms.registry import advantage
from agl_ray.types import InputError

if TYPE_CHECKING:
    from agl_ray.config.algorithm import AlgorithmConfig


@advantage("maxrl", reads=())
def maxrl(inputs: AdvantageInputs, config: AlgorithmConfig) -> npt.NDArray:
    """(R - mean) / mean [M]. InputError where a reward is negative: its mean may vanish or change the sign."""
    if len(inputs.rewards) and inputs.rewards.min() < 0:
        raise InputError(
            f"algorithm.advantage maxrl: expected rewards of 0 or more, got {inputs.rewards.min():g}; shift them or choose another"
        )
    counts = np.bincount(inputs.group)
    means = (np.bincount(inputs.group, weights=inputs.rewards) / counts)[inputs.group]
    return np.divide(inputs.rewards - means, means, out=np.zeros_like(means), where=means > 0)
