"""The learning rate: warm-up by updates, the fall by the version, alike in a resumed run and past steps without signal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_data import model_folder, random_batch

from agl_ray.config import RunConfig
from agl_ray.config.load import validate
from agl_ray.config.models import AlgorithmConfig, LearnerConfig
from agl_ray.learner.backend import Rank, open_backend
from agl_ray.learner.optim import learning_rate, share_at
from agl_ray.learner.prepare import lay_out
from agl_ray.learner.step import Learner
from agl_ray.trajectory.batch import TrainBatch
from agl_ray.types import ConfigError

COSINE = {"lr": 1e-2, "schedule": "cosine", "final_lr_share": 0.2}
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


def test_warm_up_is_linear_and_then_constant() -> None:
    config = LearnerConfig(lr=1.0, warmup_steps=4)
    rates = [learning_rate(config, update, share_at(config, 90, None)) for update in range(6)]
    assert rates == [0.25, 0.5, 0.75, 1, 1, 1]
    assert learning_rate(LearnerConfig(lr=1.0), 0, 1.0) == 1.0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_fall_is_the_formula(schedule: Any) -> None:
    config = LearnerConfig(schedule=schedule, final_lr_share=0.2)
    for version in range(12):
        done = min(1.0, version / 10)
        half_wave = 0.2 + 0.8 * (1 + math.cos(math.pi * done)) / 2
        wanted = half_wave if schedule == "cosine" else 0.2 + 0.8 * (1 - done)
        assert share_at(config, version, 10) == pytest.approx(wanted, abs=1e-12)
    warming = LearnerConfig(lr=3.0, schedule=schedule, warmup_steps=4, minibatches=2)
    half = share_at(warming, 5, 10)
    assert learning_rate(warming, 2, half) == pytest.approx(3.0 * 0.75 * half)


def falling(version: int) -> float:
    """Of COSINE."""
    return 1e-2 * (0.2 + 0.8 * (1 + math.cos(math.pi * version / STEPS)) / 2)


def trained(learner: Learner, steps: range, empty: tuple[int, ...] = ()) -> list[dict[str, float]]:
    """The metrics of these steps; those in `empty` have no groups."""
    seen = []
    for step in steps:
        spans, batch = random_batch(5, step=step)
        if step in empty:
            spans, batch = spans.slice(0, 0), TrainBatch(step=step, groups=())
        made = (spans, batch, learner.algorithm, learner.config)
        (payload,) = lay_out(*made, world_size=1, seed=0)
        seen.append(learner.train(payload))
    return seen


def test_every_update_of_a_step_has_its_rate_and_a_step_without_any_counts(folder: Path) -> None:
    config = LearnerConfig.model_validate({**COSINE, "minibatches": 2})
    learner = Learner(AlgorithmConfig(), config, folder, steps=STEPS)
    used: list[float] = []
    step = learner.optimizer.step
    learner.optimizer.step = lambda: (used.append(learner.optimizer.param_groups[0]["lr"]), step())  # type: ignore[method-assign]
    seen = trained(learner, range(1, STEPS + 1), empty=(2,))
    wanted = [falling(version) for version in range(STEPS)]
    assert [each["lr"] for each in seen] == pytest.approx(wanted)
    assert used == pytest.approx([wanted[i] for i in (0, 0, 2, 2, 3, 3)])


def test_a_resumed_run_falls_as_if_never_stopped(folder: Path, tmp_path: Path) -> None:
    ppo = AlgorithmConfig(name="ppo")
    config = LearnerConfig.model_validate({**COSINE, "warmup_steps": 3, "critic": {"lr": 0.1}})
    whole = Learner(ppo, config, folder, steps=STEPS)
    trained(whole, range(1, 3))
    whole.save(tmp_path / "step-2")
    rest = Learner(ppo, config, folder, seed=7, steps=STEPS)
    rest.load(tmp_path / "step-2")
    both = [trained(learner, range(3, STEPS + 1)) for learner in (whole, rest)]
    for name in ("lr", "critic_lr"):
        assert [each[name] for each in both[0]] == [each[name] for each in both[1]]
    assert both[1][1]["lr"] == pytest.approx(falling(3))
    assert both[1][1]["critic_lr"] == pytest.approx(10 * falling(3))
    for mine, other in ((whole, rest), (whole.critic, rest.critic)):
        assert mine is not None
        assert other is not None
        for one, same in zip(mine.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(one, same)


def test_a_run_tells_the_learner_its_steps(folder: Path, tmp_path: Path) -> None:
    run: dict[str, Any] = {"model": {"path": str(folder)}, "learner": COSINE}
    config = RunConfig.model_validate({**run, "train": {"steps": STEPS}})
    rank = Rank(0, 1, "127.0.0.1", 0)
    learner = open_backend(config, folder, rank, seed=0, base=tmp_path)
    assert isinstance(learner, Learner)
    assert learner.steps == STEPS
    validate({**run, "learner": {**COSINE, "backend": "verl"}})


def test_a_fall_needs_its_length_and_a_floor_needs_a_fall(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"learner\.schedule cosine: expected the number of"):
        Learner(AlgorithmConfig(), LearnerConfig.model_validate(COSINE), folder)
    with pytest.raises(ConfigError, match=r"learner\.final_lr_share acts with learner\.schedule"):
        validate({"model": {"path": "m"}, "learner": {"final_lr_share": 0.5}})
