"""GiGPO (arXiv 2505.10978): two group baselines, one for whole rollouts and one for calls that were made in the same state.

    A_t = (R - mean_G(R)) + w (R_t - mean_S(R_t)),   R = sum_t r_t,   R_t = sum_{k >= t} g^(k - t) r_k

G: the rollouts of a group (`credit.group`), each once. S: the calls of that group which saw the same new prompt tokens (the state that the
environment showed), of whatever rollout and turn; a state that was seen once adds nothing. g is `algorithm.gigpo_gamma`, w
`algorithm.gigpo_weight`. The paper's F_norm = 1; its division by standard deviations is left out, as GRPO's here. r_t are rewards of
calls, with `credit.outcome: last` the rollout's own one for its last call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from agl_ray.algorithms.base import AdvantageInputs, without_signal
from agl_ray.algorithms.registry import advantage

if TYPE_CHECKING:
    from agl_ray.config.algorithm import AlgorithmConfig


@advantage("gigpo", baseline="other", reads=("gigpo_gamma", "gigpo_weight"))
def gigpo(inputs: AdvantageInputs, config: AlgorithmConfig) -> npt.NDArray:
    """The advantage of each call [M]."""
    episode = _numbered(inputs.rollout, inputs.group)
    first = np.unique(episode, return_index=True)[1]
    returns = np.bincount(episode, weights=inputs.rewards)
    whole = _centred(returns, inputs.group[first])[episode]
    to_go = _discounted(inputs.rewards, episode, inputs.turn, config.gigpo_gamma)
    step = _centred(to_go, _numbered(inputs.group, inputs.state))
    return np.asarray(whole + config.gigpo_weight * step)


def _numbered(one: npt.NDArray, other: npt.NDArray) -> npt.NDArray:
    """int64 [M], 0 .. : equal where both are."""
    pairs = np.stack([one, other], axis=1)
    return np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)


def _centred(values: npt.NDArray, group: npt.NDArray) -> npt.NDArray:
    """values - the mean of their group; exactly 0 where a group's are equal."""
    means = np.bincount(group, weights=values) / np.maximum(np.bincount(group), 1)
    return np.where(without_signal(values, group), 0.0, values - means[group])


def _discounted(
    rewards: npt.NDArray, episode: npt.NDArray, turn: npt.NDArray, gamma: float
) -> npt.NDArray:
    """R_t [M]: from the last call of each episode to its first."""
    to_go = np.zeros(len(rewards))
    after: dict[int, float] = {}
    for unit in np.lexsort((-turn, episode)).tolist():
        one = int(episode[unit])
        after[one] = to_go[unit] = rewards[unit] + gamma * after.get(one, 0.0)
    return to_go
