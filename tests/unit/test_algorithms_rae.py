"""RAE: the running mean of each role against a transcription; it outlives steps and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learner_data import call, model_folder, table

from agl_ray.algorithms.algorithm import Algorithm, make_algorithm
from agl_ray.algorithms.base import AdvantageInputs
from agl_ray.config.algorithm import AlgorithmConfig
from agl_ray.config.credit import CreditConfig
from agl_ray.config.load import validate
from agl_ray.config.models import LearnerConfig
from agl_ray.learner.prepare import Payload, lay_out
from agl_ray.learner.step import Learner
from agl_ray.trajectory.batch import GroupPlan, Member, TrainBatch
from agl_ray.trajectory.credit import Credit
from agl_ray.types import ConfigError

RAE = AlgorithmConfig(advantage="rae", rae_decay=0.9)


def inputs(
    rewards: list[float], roles: list[str | None], kept: dict[str, float]
) -> AdvantageInputs:
    number = len(rewards)
    nothing = np.zeros(number, np.int64)
    return AdvantageInputs(
        np.array(rewards), nothing, nothing, np.arange(number), roles, nothing, nothing - 1, kept
    )


def by_hand(
    rewards: list[float], roles: list[str | None], means: dict[str | None, float]
) -> list[float]:
    out = []
    for value, role in zip(rewards, roles, strict=True):
        before = means.get(role, 0.0)
        out.append(value - before)
        means[role] = 0.9 * before + 0.1 * value
    return out


def test_the_running_mean_of_the_role_is_the_baseline() -> None:
    rng = np.random.default_rng(3)
    algorithm = make_algorithm(RAE)
    kept: dict[str, float] = {}
    means: dict[str | None, float] = {}
    for _ in range(3):  # steps
        rewards = rng.normal(size=40).tolist()
        roles = rng.choice(["a", "b", None], 40).tolist()
        got = algorithm.advantages_of(inputs(rewards, roles, kept))
        np.testing.assert_allclose(got, by_hand(rewards, roles, means), rtol=0, atol=1e-12)
    assert kept == pytest.approx({f"rae:{role or ''}": mean for role, mean in means.items()})


def test_equal_rewards_are_a_signal_where_a_role_used_to_get_less() -> None:
    got = make_algorithm(RAE).advantages_of(inputs([1.0, 1.0], ["a", "a"], {"rae:a": 0.5}))
    np.testing.assert_allclose(got, [0.5, 0.45], rtol=0, atol=1e-12)


def game(step: int) -> tuple[Any, TrainBatch]:
    attempt = (f"ro-{step}", f"at-{step}")
    spans: list[dict[str, Any]] = []
    for role, value in (("a", 1.0), ("b", -1.0)):
        spans.append(
            call(role, [1, 2], [3, 4], attempt=attempt, role=role, versions=[(0, step - 1)])
        )
        nothing = call(f"r{role}", [], [], attempt=attempt, prompt_tokens=None)
        columns = {"reward": value, "reward_target": f"role:{role}"}
        spans.append({**nothing, "kind": "reward", **columns})
    members = (Member(rollout_id=attempt[0], attempt_id=attempt[1], reward=0.0),)
    return table(spans), TrainBatch(step=step, groups=(GroupPlan(group_id="g", members=members),))


def laid_out(step: int, algorithm: Algorithm, kept: dict[str, float]) -> Payload:
    credit = Credit(CreditConfig(unit="role", outcome="none"))
    return lay_out(
        *game(step), algorithm, LearnerConfig(), world_size=1, seed=0, credit=credit, kept=kept
    )[0]


def test_baselines_outlive_the_step_and_are_in_the_checkpoint(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    learner = Learner(RAE, LearnerConfig(), folder)
    first = laid_out(1, learner.algorithm, learner.kept)
    assert learner.kept == {}  # laying out is no step
    assert sorted(first.updates[0].micros[0].columns["advantages"]) == [-1, -1, 0, 0, 0, 0, 1, 1]
    learner.train(first)
    assert learner.kept == pytest.approx({"rae:a": 0.1, "rae:b": -0.1})
    learner.save(tmp_path / "saved")
    again = Learner(RAE, LearnerConfig(), folder)
    again.load(tmp_path / "saved")
    assert again.kept == learner.kept
    second = laid_out(2, again.algorithm, again.kept).updates[0].micros[0]
    np.testing.assert_allclose(
        sorted(set(second.columns["advantages"].tolist())), [-0.9, 0, 0.9], atol=1e-6
    )


def test_units_that_are_no_roles_are_refused() -> None:
    words = "advantage rae needs credit.unit role, got rollout"
    with pytest.raises(ConfigError, match=words):
        validate({"model": {"path": "m"}, "algorithm": {"advantage": "rae"}})
