"""RAE, role-conditioned advantage estimation (SPIRAL, arXiv 2506.24119): the baseline is what a role has got so far, averaged with decay.

    A = R - b_role;   then b_role <- a b_role + (1 - a) R,   a = `algorithm.rae_decay`

One unit after the other, in the order of the batch; a baseline begins at 0 and outlives the step (checkpoints have it). It needs no
group, so that self-play with one game per row learns, and a role that wins more often is no reason to prefer its tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from agl_ray.algorithms.base import AdvantageInputs
from agl_ray.algorithms.registry import advantage

if TYPE_CHECKING:
    from agl_ray.config.algorithm import AlgorithmConfig


@advantage("rae", baseline="other", reads=("rae_decay",))
def rae(inputs: AdvantageInputs, config: AlgorithmConfig) -> npt.NDArray:
    """R - the running mean of its role [M]; `kept` has the means as `rae:ROLE`."""
    made = np.zeros(len(inputs.rewards))
    decay = config.rae_decay
    for unit, (reward, role) in enumerate(zip(inputs.rewards.tolist(), inputs.role, strict=True)):
        name = f"rae:{role or ''}"
        baseline = inputs.kept.get(name, 0.0)
        made[unit] = reward - baseline
        inputs.kept[name] = decay * baseline + (1 - decay) * reward
    return made
