"""Soft overlong punishment (DAPO, arXiv 2503.14476, section 3.4): a response that nears the longest length loses reward, step by step.

    penalty(n) = clip((L - B - n) / B, -1, 0),   R(u) <- R(u) + factor * penalty(n of u)

n: tokens that the policy sampled in the unit of credit, all of its calls together, those of dropped rows included; prompts, tool results and
calls that are not the policy's (frozen, failed, greedy, constrained) are none of them. L is `algorithm.overlong_tokens`, B
`algorithm.overlong_buffer`, factor `algorithm.overlong_factor` (1 in the paper). Every advantage is made of the rewards after it, registered ones and
a critic's included; the metrics of rewards are of those before it. `zero_signal: refill` looks at those before it too, as the paper's dynamic
sampling looks at right and wrong: a row that was answered equally well is replaced, however long its answers were.

Called by learner/prepare.py. Pure numpy; test it alone with tests/unit/test_algorithms_overlong.py. Legend: U units of credit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from agl_ray.config.algorithm import AlgorithmConfig


def overlong_penalty(tokens: npt.NDArray, config: AlgorithmConfig) -> npt.NDArray:
    """float64 [U], what is added to the rewards of units of so many `tokens` [U]: -overlong_factor .. 0; 0 where the switch is off."""
    longest, buffer = config.overlong_tokens, config.overlong_buffer
    if longest is None or buffer is None:
        return np.zeros(len(tokens))
    return config.overlong_factor * np.clip((longest - buffer - tokens) / buffer, -1.0, 0.0)
