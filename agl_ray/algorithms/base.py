"""What an algorithm is made of: an advantage for every unit of credit, and a gain for every token. One file each.

    loss = - sum_t scale_t w_t gain_t   + the term of kl.py, where it is switched on

`gain_t` comes from a policy-loss function (grpo.py, gspo.py, ...), the advantages inside it from an advantage function (grpo.py,
rloo.py, ...), `w_t` from correction.py, `scale_t` from aggregation.py. Functions are found by name (`agl_ray.algorithms.registry`).
Test one alone with tests/unit/test_algorithms_*.py. Legend: M units of credit (rollouts, unless `credit.unit` says otherwise), T tokens of one micro-batch, S sequences (rows) in it; with a critic
K trained tokens of the whole batch in E episodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class AdvantageInputs:
    """rewards: float64 [M]. group: int64 [M], 0 .. number of groups - 1. tokens: int64 [M], tokens that the unit's model calls produced,
    before anything is dropped.

    Where the units come from: rollout: int64 [M], the rollout's index. role: [M], None for none. turn: int64 [M], the call's number in its
    attempt, from 1; 0 where the unit is no call. state: int64 [M], equal where two calls saw the same new prompt tokens; -1 where the unit
    is no call. kept: numbers that outlive the step: what a function writes there, it finds there in the next step, a resumed run included.
    """

    rewards: npt.NDArray
    group: npt.NDArray
    tokens: npt.NDArray
    rollout: npt.NDArray
    role: Sequence[str | None]
    turn: npt.NDArray
    state: npt.NDArray
    kept: dict[str, float]


@dataclass(frozen=True, slots=True)
class Episodes:
    """What a critic's advantages are made from. rewards: float64 [K], of each trained token, episode after episode, in time. lengths: int64
    [E], each >= 1: tokens per episode."""

    rewards: npt.NDArray
    lengths: npt.NDArray

    def next_of(self, values: npt.NDArray) -> npt.NDArray:
        """[K]: `values` of the next token, 0 behind the last one of an episode."""
        following = np.append(values[1:], 0.0)[: len(values)]
        following[np.cumsum(self.lengths) - 1] = 0.0
        return following


class CriticAdvantages(NamedTuple):
    """float64 [K] each. returns: what the critic's values should have been."""

    advantages: npt.NDArray
    returns: npt.NDArray


def without_signal(rewards: npt.NDArray, group: npt.NDArray) -> npt.NDArray:
    """bool [M]: all rewards of the unit's group are equal."""
    high, low = (
        np.full(group.max(initial=-1) + 1, -np.inf),
        np.full(group.max(initial=-1) + 1, np.inf),
    )
    np.maximum.at(high, group, rewards)
    np.minimum.at(low, group, rewards)
    return (high == low)[group]


@dataclass(frozen=True, slots=True)
class LossInputs:
    """The streams of one micro-batch, each float32 [T] on the model's device.

    logprobs: log pi, the learner's now, with gradient. old_logprobs: log pi_old, the learner's at the start of the batch.
    engine_logprobs: log mu, the engine's that sampled. entropy: of the whole distribution, nats, with gradient; None where
    `Algorithm.needs_entropy` is False. advantages: of the unit of credit that the token belongs to. weights: 1 where the
    token counts, else 0 (there the other streams mean nothing but are finite). scale: what a counted token adds to the loss, over
    all micro-batches and ranks (aggregation.py). sequence: int64 [T], the row that the token belongs to, 0 .. num_sequences - 1.
    reference_logprobs: the reference model's, where there is one (`algorithm.kl`). teacher_logprobs: likewise (`algorithm.teacher`). chosen: bool [T], see `Tokens`.
    """

    logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    engine_logprobs: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    scale: torch.Tensor
    sequence: torch.Tensor
    num_sequences: int
    reference_logprobs: torch.Tensor | None = None
    teacher_logprobs: torch.Tensor | None = None
    chosen: torch.Tensor | None = None
    entropy: torch.Tensor | None = None

    def chosen_tokens(self) -> torch.Tensor:
        """bool [T]: what the policy loss's `choose` chose; ValueError where none did."""
        if self.chosen is None:
            raise ValueError("LossInputs.chosen: expected the tokens that `choose` chose, got none")
        return self.chosen

    def over_sequences(self, values: torch.Tensor, *, mean: bool) -> torch.Tensor:
        """[S]: the sum (or mean) of `values` [T] over the counted tokens of each sequence; 0 where a sequence has none."""
        import torch

        sums = torch.zeros(self.num_sequences, dtype=values.dtype, device=values.device)
        sums = sums.index_add(0, self.sequence, values * self.weights)
        if not mean:
            return sums
        counts = torch.zeros_like(sums).index_add(0, self.sequence, self.weights)
        return sums / counts.clamp(min=1.0)


class Tokens(NamedTuple):
    """All counted tokens of one update, of all micro-batches and ranks, without gradient, float64 [K] each: what a policy loss may choose
    tokens from (`registry.policy_loss`). draws: uniform in [0, 1), a token's own in this step, however the batch is cut up."""

    logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    draws: torch.Tensor


class Gain(NamedTuple):
    """gain: float32 [T] with gradient, to be raised. marks: float32 or bool [T] without gradient; their means over the counted
    tokens are the step's metrics under these names."""

    gain: torch.Tensor
    marks: dict[str, torch.Tensor] = {}


@dataclass(frozen=True, slots=True)
class LossOutputs:
    """loss: this micro-batch's share, a scalar; the shares of all micro-batches and ranks are added, never averaged.

    sums: scalars without gradient that are added likewise and then divided by the number of counted tokens: the
    step's metrics under these names.
    """

    loss: torch.Tensor
    sums: dict[str, torch.Tensor]
