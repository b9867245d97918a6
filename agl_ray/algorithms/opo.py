"""OPO (arXiv 2505.23585): the baseline weighs each rollout of the group by its length, which has the least variance.

A_i = R_i - sum_j |o_j| R_j / sum_j |o_j|;   a group without tokens has A = 0
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from agl_ray.algorithms.base import AdvantageInputs
from agl_ray.algorithms.registry import advantage

if TYPE_CHECKING:
    from agl_ray.config.algorithm import AlgorithmConfig


@advantage("opo", reads=())
def opo(inputs: AdvantageInputs, config: AlgorithmConfig) -> npt.NDArray:
    """R - length-weighted mean of the group [M]."""
    tokens = np.bincount(inputs.group, weights=inputs.tokens)
    weighted = np.bincount(inputs.group, weights=inputs.tokens * inputs.rewards)
    baseline = np.divide(weighted, tokens, out=np.zeros_like(weighted), where=tokens > 0)
    return np.where(tokens[inputs.group] > 0, inputs.rewards - baseline[inputs.group], 0.0)
