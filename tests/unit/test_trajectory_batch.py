"""TrainBatch: JSON both ways, and what it refuses."""

from __future__ import annotations

import pytest

from agl_ray.trajectory.batch import GroupPlan, Member, TrainBatch
from agl_ray.types import from_json, to_json


def member(i: int, reward: float = 0.5) -> Member:
    return Member(rollout_id=f"ro-{i}", attempt_id=f"at-{i}", reward=reward)


def test_json_both_ways() -> None:
    batch = TrainBatch(
        step=3,
        groups=(
            GroupPlan(group_id="a", members=(member(1), member(2))),
            GroupPlan(group_id="b", members=(member(3, -1.25),)),
        ),
    )
    assert from_json(to_json(batch), TrainBatch) == batch
    assert batch.attempts == [("ro-1", "at-1"), ("ro-2", "at-2"), ("ro-3", "at-3")]
    assert [m.reward for m in batch.members] == [0.5, 0.5, -1.25]


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), -float("inf")])
def test_a_reward_that_is_no_number_is_refused(reward: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        member(1, reward)


def test_an_empty_group_is_refused() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        GroupPlan(group_id="a", members=())
