"""A role that is not trained leaves no trace in the weights: neither its tokens nor how many of them there are."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from learner_data import VOCABULARY, call, model_folder, table

from agl_ray.config.models import AlgorithmConfig, CreditConfig, LearnerConfig
from agl_ray.learner.prepare import lay_out
from agl_ray.learner.step import Learner
from agl_ray.spans.schema import ROLE_KIND
from agl_ray.trajectory.batch import GroupPlan, Member, TrainBatch
from agl_ray.trajectory.credit import Credit


def two_roles(step: int, critic: Literal["silent", "short", "long"]) -> tuple[Any, TrainBatch]:
    """Two groups of four rollouts: a planner speaks twice, and a frozen critic between, its answers given by `critic`."""
    chance = np.random.default_rng(step)
    spans, groups = [], []
    for group in range(2):
        members = []
        for rollout in range(4):
            attempt = (f"ro-{step}-{group}-{rollout}", f"at-{step}-{group}-{rollout}")
            at: dict[str, Any] = {"attempt": attempt, "versions": [(0, step - 1)]}
            near = {"logprobs": [-np.log(VOCABULARY)] * 4}
            first, second = (chance.integers(0, VOCABULARY, 4).tolist() for _ in range(2))
            spans.append(call("p1", [2, 3], first, role="planner", **at | near))
            if critic != "silent":
                length = 3 if critic == "short" else 9
                words = chance.spawn(1)[0].integers(0, VOCABULARY, length).tolist()
                frozen = {"attributes": {ROLE_KIND: "frozen"}, "versions": [(0, 0)]}
                spans.append(call("c", [5, *first], words, role="critic", **at | frozen))
            spans.append(
                call("p2", [7], second, role="planner", parent="p1", shared=6, **at | near)
            )
            reward = float(rollout % 2)
            members.append(Member(rollout_id=attempt[0], attempt_id=attempt[1], reward=reward))
        groups.append(GroupPlan(group_id=f"{step}-{group}", members=tuple(members)))
    return table(spans), TrainBatch(step=step, groups=tuple(groups))


def trained(folder: Path, credit: CreditConfig, critic: Any) -> tuple[dict[str, str], float]:
    """Hash of every tensor after two steps, and how many calls were of the frozen role."""
    config = LearnerConfig(lr=1e-2, tokens_per_microbatch=40)
    learner = Learner(AlgorithmConfig(), config, folder)
    frozen = 0.0
    for step in (1, 2):
        spans, batch = two_roles(step, critic)
        (payload,) = lay_out(
            spans, batch, learner.algorithm, config, world_size=1, seed=0, credit=Credit(credit)
        )
        metrics = learner.train(payload)
        assert metrics["tokens_trained"] == 2 * 4 * 8  # the planner's
        frozen += metrics["calls_frozen"]
    return hashes(learner), frozen


def hashes(learner: Learner) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for name, tensor in learner.full_state()
    }


@pytest.mark.parametrize("unit", ["rollout", "role"])
def test_what_a_frozen_role_says_changes_no_tensor(
    tmp_path: Path, unit: Literal["rollout", "role"]
) -> None:
    folder = model_folder(tmp_path / "model")
    credit = CreditConfig(unit=unit)
    alone, none = trained(folder, credit, "silent")
    assert (trained(folder, credit, "short"), none) == ((alone, 16.0), 0.0)
    assert trained(folder, credit, "long") == (alone, 16.0)
    base = hashes(Learner(AlgorithmConfig(), LearnerConfig(), folder))
    assert base.keys() == alone.keys()
    assert all(base[name] != alone[name] for name in base)
