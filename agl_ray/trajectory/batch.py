"""What the controller hands to the learner for one step: ids and rewards, never tokens or tensors.

Made by the controller from rollouts that ended `ok`; read by learner/prepare.py on rank 0. JSON both ways with
`types.to_json` and `types.from_json(body, TrainBatch)`. Test it alone with tests/unit/test_trajectory_batch.py.
"""

from __future__ import annotations

import math

from agl_ray.types.rollout import Record


class Member(Record, frozen=True):
    """One rollout of a group: its attempt that ended `ok`, and that attempt's reward (finite)."""

    rollout_id: str
    attempt_id: str
    reward: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.reward):
            raise ValueError(
                f"Member.reward of rollout {self.rollout_id}: expected a finite number, got {self.reward}; "
                "an attempt without a reward did not end ok and must not be in the batch"
            )


class GroupPlan(Record, frozen=True):
    """The surviving rollouts of one row of the dataset; their mean reward is the baseline."""

    group_id: str
    members: tuple[Member, ...]

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError(
                f"GroupPlan.members of group {self.group_id}: expected 1 or more, got 0"
            )


class TrainBatch(Record, frozen=True):
    """One training step. `step` counts from 1; it turns weight version `step - 1` into version `step`.

    groups: fewer than the step's slots, or none, where no more groups with signal were found (`algorithm.zero_signal: refill`). next_row:
    how many rows had been handed out when it was made, and open_rows: which of them to batches that are not yet journalled, so that a
    run resumed from it goes on with those. sampled: counts of what was sampled for it, for the step's metrics.
    """

    step: int
    groups: tuple[GroupPlan, ...]
    next_row: int = 0
    open_rows: tuple[int, ...] = ()
    sampled: dict[str, float] = {}

    @property
    def members(self) -> list[Member]:
        """All members, group by group."""
        return [member for group in self.groups for member in group.members]

    @property
    def attempts(self) -> list[tuple[str, str]]:
        """(rollout_id, attempt_id) of all members, group by group: what `store.read_spans` takes."""
        return [(member.rollout_id, member.attempt_id) for member in self.members]

    @property
    def metrics(self) -> dict[str, float | None]:
        """What the step's metrics say of the batch; reward is None where it has no groups."""
        rewards = [member.reward for member in self.members]
        return {
            "step": self.step,
            "reward": sum(rewards) / len(rewards) if rewards else None,
            "groups": len(self.groups),
            "rollouts": len(rewards),
            **self.sampled,
        }
