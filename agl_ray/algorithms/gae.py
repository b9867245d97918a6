"""Generalised advantage estimation (arXiv 1506.02438): every token has an advantage of its own, from a critic's values.

    delta_t = r_t + g V_{t+1} - V_t          A_t = delta_t + g l A_{t+1}          return_t = V_t + A_t (with the critic's own l)

Time steps are the trained tokens of one episode, in the order in which they were made; what the model did not say (tool results, user
turns, calls of frozen roles) lies between two of them and takes no time. V after the last one is 0. An episode is a unit of credit
(`credit.unit`), however many rows it was cut into, or with `algorithm.gae_over: rollout` all of its rollout's units together. A unit's
reward stands at its last trained token: at the last one that is left, where its row was cut or dropped.

g is `algorithm.gae_gamma`, l `algorithm.gae_lambda`, and `algorithm.gae_return_lambda` for the returns that the critic learns (VC-PPO's
decoupled GAE, 2503.01491). `normalize: batch` whitens the advantages over all trained tokens of the batch. learner/prepare.py makes the
episodes (rank 0), learner/critic.py the values. Pure numpy; test it alone with tests/unit/test_algorithms_gae.py.
Legend: K trained tokens of the batch, E episodes, U units of credit, L tokens of the longest episode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from agl_ray.algorithms.base import CriticAdvantages, Episodes
from agl_ray.algorithms.registry import advantage

if TYPE_CHECKING:
    from agl_ray.config.algorithm import AlgorithmConfig


@advantage("gae", baseline="critic", reads=("gae_gamma", "gae_lambda", "gae_return_lambda"))
def gae(episodes: Episodes, values: npt.NDArray, config: AlgorithmConfig) -> CriticAdvantages:
    """Advantages and returns [K] of `values` [K]."""
    gamma = config.gae_gamma
    deltas = episodes.rewards + gamma * episodes.next_of(values) - values
    advantages = discounted_sums(deltas, episodes.lengths, gamma * config.gae_lambda)
    if config.gae_return_lambda is None:
        return CriticAdvantages(advantages, values + advantages)
    to_learn = discounted_sums(deltas, episodes.lengths, gamma * config.gae_return_lambda)
    return CriticAdvantages(advantages, values + to_learn)


def discounted_sums(values: npt.NDArray, lengths: npt.NDArray, factor: float) -> npt.NDArray:
    """float64 [K]: sum_{i >= 0} factor^i values_{t + i} within t's episode, in log2(L) passes over the array.

    After pass j a token has the sum of the 2^j tokens from it on; the next pass adds that of the token 2^j later.
    """
    sums = np.array(values, np.float64)
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(sums))  # itself included
    step, weight = 1, float(factor)
    while step < lengths.max(initial=0) and weight > 0.0:
        sums[:-step] += np.where(left[:-step] > step, weight * sums[step:], 0.0)
        step, weight = 2 * step, weight * weight
    return sums


@dataclass(frozen=True, slots=True)
class TokenPlaces:
    """Where trained tokens and units of credit stand in time. line: int64 [K], the episode, call: int64 [K], the number of the call that made
    the token, at: int64 [K], its place in its row. unit_line, unit_call: int64 [U], the unit's episode and its last call, -1 for none.
    Calls of one episode are numbered in the order in which they were made."""

    line: npt.NDArray
    call: npt.NDArray
    at: npt.NDArray
    unit_line: npt.NDArray
    unit_call: npt.NDArray


def lay_episodes(places: TokenPlaces, rewards: npt.NDArray) -> tuple[Episodes, npt.NDArray]:
    """The episodes, and int64 [K], the index in them of each token of `places`. rewards: float64 [U].

    A reward stands at the last token of its episode that was made by its unit's last call or before; it is left out where there is none: no
    trained token could have earned it.
    """
    order = np.lexsort((places.at, places.call, places.line))
    index = np.empty(len(order), np.int64)
    index[order] = np.arange(len(order))
    line, call = places.line[order], places.call[order]
    most = 1 + max(call.max(initial=0), places.unit_call.max(initial=0))
    ends = np.searchsorted(
        line * most + call, places.unit_line * most + places.unit_call, side="right"
    )
    there = (ends > 0) & (places.unit_call >= 0)
    there[there] = line[ends[there] - 1] == places.unit_line[there]
    placed = np.zeros(len(order))
    np.add.at(placed, ends[there] - 1, rewards[there])
    begins = np.flatnonzero(np.diff(line, prepend=-1))
    return Episodes(placed, np.diff(begins, append=len(line))), index
