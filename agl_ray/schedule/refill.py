"""Groups without signal are replaced by groups of further rows (DAPO's dynamic sampling, arXiv 2503.14476, section 3.2).

    a slot's group ends:   signal       -> TAKE: it is in the batch
                           no signal    -> AGAIN while the step has extra groups left: the slot tries another row
                           none is left -> SHORT: the slot stays empty, the batch goes on with fewer groups

The extra groups are the step's, not the slot's: a step whose slots are unlucky in turn costs no more than one whose slots are unlucky
at once. Pure, no asyncio: called by actors/rollout_groups.py as groups end. Test it alone with tests/unit/test_schedule_refill.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Fate(StrEnum):
    """What becomes of a slot whose group has ended."""

    TAKE = "take"
    AGAIN = "again"
    SHORT = "short"


@dataclass(slots=True)
class _Step:
    sampled: int = 0
    refilled: int = 0
    short: int = 0
    rewards: float = 0.0
    rollouts: int = 0


class Refill:
    """extra_per_step: most groups of one step that are replaced; >= 1."""

    def __init__(self, extra_per_step: int) -> None:
        if extra_per_step < 1:
            raise ValueError(f"extra_per_step: expected 1 or more, got {extra_per_step}")
        self.extra_per_step = extra_per_step
        self._steps: dict[int, _Step] = {}

    def fate(self, step: int, rewards: Sequence[float], *, signal: bool) -> Fate:
        """Count a group that ended with these rewards for `step`, and say what becomes of its slot."""
        of_step = self._steps.setdefault(step, _Step())
        of_step.sampled += 1
        of_step.rewards += sum(rewards)
        of_step.rollouts += len(rewards)
        if signal:
            return Fate.TAKE
        if of_step.refilled < self.extra_per_step:
            of_step.refilled += 1
            return Fate.AGAIN
        of_step.short += 1
        return Fate.SHORT

    def settle(self, step: int) -> dict[str, float]:
        """What was sampled for `step`, whose batch is whole: groups_sampled, groups_refilled, groups_short, and reward_sampled, the mean
        reward of all of their rollouts (the batch's own leaves out what was all right and all wrong). The step is forgotten."""
        of_step = self._steps.pop(step, _Step())
        return {
            "groups_sampled": float(of_step.sampled),
            "groups_refilled": float(of_step.refilled),
            "groups_short": float(of_step.short),
            "reward_sampled": of_step.rewards / max(1, of_step.rollouts),
        }
