"""Algorithm: the switches of the configuration put together. The learner knows this class and nothing of what is inside.

learner/prepare.py calls `advantages_of` and `scales` on the whole batch (numpy), learner/step.py calls `loss` on every micro-batch
(torch). Test alone: tests/unit/test_algorithms_grpo.py, test_algorithms_losses.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from agl_ray.algorithms import kl
from agl_ray.algorithms.aggregation import token_scales
from agl_ray.algorithms.base import (
    AdvantageInputs,
    CriticAdvantages,
    Episodes,
    LossInputs,
    LossOutputs,
    Tokens,
    without_signal,
)
from agl_ray.algorithms.correction import correction
from agl_ray.algorithms.opd import teacher_advantages, teacher_marks
from agl_ray.algorithms.registry import (
    OTHER_BASELINES,
    acts_by_advantage,
    find_advantage,
    find_choice,
    find_policy_loss,
    refuse_unread,
)
from agl_ray.config.imports import load_module
from agl_ray.types import ConfigError, InputError

if TYPE_CHECKING:
    import torch

    from agl_ray.config.algorithm import AlgorithmConfig

TINY = 1e-6  # added to a standard deviation


class Algorithm:
    """needs_entropy: the loss takes the entropy of whole distributions.
    needs_critic: the advantages are of tokens and made from a critic's values (`critic_advantages`), not of units (`advantages_of`).
    skip_zero_advantage: a token of advantage 0 adds nothing to the loss, so that its row need not be run forward.
    late_advantages: they need the model's log-probabilities, so the learner has them made, not the layout (learner/prepare.py).
    needs_choice: the policy loss acts on tokens that `choose` finds among all of an update."""

    def __init__(self, config: AlgorithmConfig, base: Path | None = None) -> None:
        self.config = config
        self.needs_entropy = config.entropy_coefficient > 0
        self.late_advantages = config.kl.in_reward
        for place in config.imports:
            load_module(place, base or Path.cwd())
        self._advantage, self._of_critic = find_advantage(config.advantage, base)
        self.needs_critic = self._of_critic is not None
        if self.needs_critic and config.normalize == "group":
            raise ConfigError(
                f"algorithm.normalize group: expected batch or none, since a critic's advantage ({config.advantage}) has no groups"
            )
        self._gain = find_policy_loss(config.loss, base)
        self._choice = find_choice(config.loss)
        self.needs_choice = self._choice is not None
        chosen = (self._gain, self._advantage, self._of_critic)
        refuse_unread(config, [function for function in chosen if function is not None])
        all_rows = (
            self.needs_entropy
            or not acts_by_advantage(config.loss, self._gain)
            or self.needs_critic
            or config.teacher is not None
        )
        self.skip_zero_advantage = not (config.kl.in_loss or config.kl.in_reward or all_rows)
        if config.zero_signal == "refill" and config.advantage in OTHER_BASELINES:
            raise ConfigError(
                f"algorithm.zero_signal refill: expected an advantage whose baseline is the group's, got {config.advantage}, under which equal "
                "rewards may have signal; say algorithm.zero_signal: keep"
            )

    def advantages(
        self, rewards: npt.NDArray, group_index: npt.NDArray, tokens: npt.NDArray | None = None
    ) -> npt.NDArray:
        """`advantages_of` for M whole rollouts: rewards float64 [M], group_index int64 [M], tokens int64 [M] (None: all alike)."""
        number = len(rewards)
        nothing = np.zeros(number, np.int64)
        return self.advantages_of(
            AdvantageInputs(
                rewards=np.asarray(rewards, np.float64),
                group=np.unique(group_index, return_inverse=True)[1],
                tokens=np.ones(number, np.int64) if tokens is None else tokens,
                rollout=np.arange(number),
                role=[None] * number,
                turn=nothing,
                state=nothing - 1,
                kept={},
            )
        )

    def advantages_of(self, inputs: AdvantageInputs) -> npt.NDArray:
        """float64 [M], one for each unit of credit. Taken before anything is dropped.

        InputError where a user's function gives another shape or no finite numbers; 0 for all with a critic.
        """
        rewards = inputs.rewards
        if self._advantage is None:
            return np.zeros(len(rewards))
        made = self._checked(self._advantage(inputs, self.config), len(rewards))
        if self.config.advantage not in OTHER_BASELINES:
            made[without_signal(rewards, inputs.group)] = 0.0  # not the rounding error of the mean
        return self._normalized(made, inputs.group)

    def critic_advantages(self, episodes: Episodes, values: npt.NDArray) -> CriticAdvantages:
        """float64 [K] each, from the critic's values [K]; the advantages whitened over them all where the configuration says so."""
        if self._of_critic is None:
            raise ConfigError(f"algorithm.advantage {self.config.advantage} has no critic")
        made = self._of_critic(episodes, values, self.config)
        advantages, returns = (self._checked(stream, len(values)) for stream in made)
        return CriticAdvantages(self._normalized(advantages, np.zeros(0, np.int64)), returns)

    def _checked(self, made: npt.ArrayLike, number: int) -> npt.NDArray:
        made = np.asarray(made, np.float64)
        if made.shape != (number,) or not np.isfinite(made).all():
            raise InputError(
                f"algorithm.advantage {self.config.advantage}: expected {number} finite numbers, got shape {made.shape}"
                f"{'' if np.isfinite(made).all() else ' with values that are not finite'}"
            )
        return made

    def _normalized(self, values: npt.NDArray, group: npt.NDArray) -> npt.NDArray:
        if self.config.normalize == "group":
            counts = np.bincount(group)
            means = (np.bincount(group, weights=values) / counts)[group]
            variance = np.bincount(group, weights=(values - means) ** 2) / counts
            return values / (np.sqrt(variance)[group] + TINY)
        if self.config.normalize == "batch" and len(values):
            return (values - values.mean()) / (values.std() + TINY)
        return values

    def scales(self, counted: npt.NDArray, rollout: npt.NDArray, row: npt.NDArray) -> npt.NDArray:
        """float64 [N]: see `aggregation.token_scales`."""
        return token_scales(counted, rollout, row, self.config)

    def choose(self, tokens: Tokens) -> torch.Tensor:
        """bool [K]: the tokens that the policy loss is to find marked. InputError where a user's function gives anything else."""
        if self._choice is None:
            raise ConfigError(f"algorithm.loss {self.config.loss} chooses no tokens")
        chosen = self._choice(tokens, self.config)
        if chosen.shape != tokens.logprobs.shape or str(chosen.dtype) != "torch.bool":
            raise InputError(
                f"algorithm.loss {self.config.loss}: expected its `choose` to return bool [{len(tokens.logprobs)}], got {chosen.dtype} "
                f"{[*chosen.shape]}"
            )
        return chosen

    def with_teacher(self, inputs: LossInputs) -> LossInputs:
        """The streams with the teacher's part in the advantages (opd.py); as they are where there is no teacher."""
        teacher, logprobs = self.config.teacher, inputs.teacher_logprobs
        if teacher is None or logprobs is None:
            return inputs
        more = teacher_advantages(inputs.old_logprobs, logprobs, teacher)
        return replace(inputs, advantages=inputs.advantages + more)

    def teacher_marks(self, inputs: LossInputs) -> dict[str, torch.Tensor]:
        """As `opd.teacher_marks`; {} where there is no teacher."""
        teacher, logprobs = self.config.teacher, inputs.teacher_logprobs
        if teacher is None or logprobs is None:
            return {}
        return teacher_marks(inputs.old_logprobs, logprobs, teacher)

    def seen(self, inputs: LossInputs) -> LossInputs:
        """The streams as the policy loss sees them: `old_logprobs` is what its ratio is taken against (`algorithm.proximal`)."""
        if self.config.proximal == "learner":
            return inputs
        return replace(inputs, old_logprobs=inputs.engine_logprobs)

    def loss(self, inputs: LossInputs) -> LossOutputs:
        """The micro-batch's share of the loss. sums: corrected_fraction, the marks of the policy loss, entropy_full where it is needed."""
        inputs = self.seen(inputs)
        weight, cut = correction(inputs, self.config)
        gain, marks = self._gain(inputs, self.config)
        counted = inputs.weights
        sums = {name: (counted * mark.detach()).sum() for name, mark in marks.items()}
        sums["corrected_fraction"] = (counted * cut).sum()
        loss = -(counted * inputs.scale * weight * gain).sum()
        if self.config.kl.in_loss:
            term = kl.loss_term(inputs, weight, self.config.kl)
            loss = (
                loss + (self.config.kl.coefficient or 0.0) * (counted * inputs.scale * term).sum()
            )
        if inputs.entropy is not None:
            bonus = (counted * inputs.scale * inputs.entropy).sum()
            loss = loss - self.config.entropy_coefficient * bonus
            sums["entropy_full"] = (counted * inputs.entropy.detach()).sum()
        return LossOutputs(loss, sums)


def make_algorithm(config: AlgorithmConfig, base: Path | None = None) -> Algorithm:
    """The algorithm that the configuration says; files are looked up in the current directory, then in `base`. ConfigError names an
    unknown function, InputError a file that is not there or cannot be imported."""
    return Algorithm(config, base)
