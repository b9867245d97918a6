"""RLOO (arXiv 2402.14740): the baseline of a rollout is the mean reward of the others of its group.

A_i = R_i - mean_{j != i}(R_j) = G / (G - 1) (R_i - mean_G(R));   a group of one has no baseline and A = 0
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from agl_ray.algorithms.base import AdvantageInputs
from agl_ray.algorithms.grpo import group
from agl_ray.algorithms.registry import advantage

if TYPE_CHECKING:
    from agl_ray.config.algorithm import AlgorithmConfig


@advantage("rloo", reads=())
def rloo(inputs: AdvantageInputs, config: AlgorithmConfig) -> npt.NDArray:
    """R - mean of the others [M]."""
    size = np.bincount(inputs.group)[inputs.group].astype(np.float64)
    return group(inputs, config) * np.divide(
        size, size - 1, out=np.zeros_like(size), where=size > 1
    )
