"""Training with a teacher: rows it did not score leave, the student comes near it, and nothing hangs on how the batch is cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distillation import own_rollouts
from learner_data import VOCABULARY, model_folder, random_batch
from transformers import AutoModelForCausalLM

from agl_ray.algorithms.algorithm import make_algorithm
from agl_ray.config.models import AlgorithmConfig, LearnerConfig
from agl_ray.config.trajectory import TrajectoryConfig
from agl_ray.learner.prepare import Payload, Score, lay_out
from agl_ray.learner.step import Learner
from agl_ray.learner.teacher import Scores
from agl_ray.trajectory.ragged import Rows

TEACHER = {"base_url": "http://unused/v1", "model": "m"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("teacher"), seed=1)


def algorithm(name: str = "opd", **given: Any) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate({"name": name, "teacher": TEACHER, **given})


def scoring(folder: Path, *, without: tuple[int, ...] = ()) -> Score:
    """The model of `folder` as the teacher, through plain transformers, row by row in float64; rows `without` are not scored."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)

    @torch.no_grad()
    def score(rows: Rows) -> Scores:
        logprobs = np.zeros(len(rows.ids), np.float32)
        for start, length in zip(rows.starts, rows.lengths, strict=True):
            ids = torch.from_numpy(rows.ids[start : start + length].astype(np.int64))
            every = torch.log_softmax(model(input_ids=ids[None], use_cache=False).logits[0], -1)
            logprobs[start + 1 : start + length] = every[:-1].gather(1, ids[1:, None])[:, 0]
        scored = ~np.isin(np.arange(len(rows)), without)
        return Scores(logprobs, scored, {"rows_scored": float(scored.sum())})

    return score


def laid_out(
    made: AlgorithmConfig, score: Score, config: LearnerConfig | None = None, **more: Any
) -> Payload:
    spans, batch = random_batch(3)
    given = {"world_size": 1, "seed": 0, "score": score, **more}
    return lay_out(spans, batch, make_algorithm(made), config or LearnerConfig(), **given)[0]


def test_a_row_without_a_score_leaves_after_the_advantages(folder: Path, other: Path) -> None:
    whole = laid_out(algorithm("grpo"), scoring(other))
    less = laid_out(algorithm("grpo"), scoring(other, without=(0, 3)))
    assert less.stats["rows"] == whole.stats["rows"] - 2
    assert less.stats["rows_scored"] == less.stats["rows"]
    for name in ("advantage_mean", "advantage_std", "advantage_max", "rollouts"):
        assert less.stats[name] == whole.stats[name]
    assert less.stats["tokens_of_batch"] < whole.stats["tokens_of_batch"]
    assert less.stats["zero_signal_groups"] == 0  # a group of equal rewards has a teacher
    for payload in (whole, less):
        micros = payload.updates[0].micros
        scale = sum(float((m.columns["scale"] * (m.weights > 0)).sum()) for m in micros)
        assert scale == pytest.approx(1.0, rel=1e-5)  # the token mean is over the rows that stay


def test_without_a_teacher_to_ask_it_does_not_begin() -> None:
    spans, batch = random_batch(3)
    with pytest.raises(ValueError, match=r"score: expected the teacher of algorithm.teacher"):
        lay_out(spans, batch, make_algorithm(algorithm()), LearnerConfig(), world_size=1, seed=0)


def step(
    folder: Path, made: AlgorithmConfig, score: Score, config: LearnerConfig, **more: Any
) -> tuple[dict[str, float], torch.Tensor]:
    """Metrics and weights after one step."""
    learner = Learner(made, config, folder)
    metrics = learner.train(laid_out(made, score, config, **more))
    return metrics, torch.cat([p.detach().flatten() for p in learner.model.parameters()])


def test_a_student_that_equals_its_teacher_learns_nothing(folder: Path) -> None:
    metrics, _ = step(folder, algorithm(), scoring(folder), LearnerConfig())
    assert abs(metrics["kl_teacher"]) < 1e-6
    assert metrics["teacher_bounded_fraction"] == 0
    assert metrics["grad_norm"] < 1e-5
    assert metrics["tokens_trained"] > 50


VARIANTS: dict[str, Callable[[], dict[str, Any]]] = {
    "small micro-batches": lambda: {"config": LearnerConfig(tokens_per_microbatch=40)},
    "tree": lambda: {"trajectory": TrajectoryConfig(rows="tree")},
}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_nothing_hangs_on_how_the_batch_is_cut(variant: str, folder: Path, other: Path) -> None:
    given = VARIANTS[variant]()
    config = given.pop("config", LearnerConfig())
    plain, _ = step(folder, algorithm("grpo"), scoring(other), LearnerConfig())
    cut, _ = step(folder, algorithm("grpo"), scoring(other), config, **given)
    for name in ("loss", "grad_norm", "kl_teacher", "tokens_trained"):
        assert cut[name] == pytest.approx(plain[name], rel=1e-4), name


@pytest.mark.parametrize(
    "made",
    [
        algorithm("ppo"),
        algorithm("kl_cov"),
        algorithm("gspo", entropy_coefficient=1e-3),
        algorithm("grpo", kl={"coefficient": 0.1, "where": "reward"}),
        algorithm("opd", proximal="engine", correction="none"),
    ],
    ids=lambda made: f"{made.name}-{made.proximal}",
)
def test_it_goes_with_the_others(made: AlgorithmConfig, folder: Path, other: Path) -> None:
    metrics, weights = step(folder, made, scoring(other), LearnerConfig(minibatches=2))
    assert abs(metrics["kl_teacher"]) > 0.01  # of made-up rollouts, so of either sign
    assert metrics["grad_norm"] > 0
    assert torch.isfinite(weights).all()


def test_the_student_comes_near_its_teacher(folder: Path, other: Path) -> None:
    config = LearnerConfig(lr=5e-3, minibatches=2)
    learner, score = Learner(algorithm(), config, folder), scoring(other)
    seen = []
    for number in range(1, 13):
        spans, batch = own_rollouts(
            learner, number, vocabulary=VOCABULARY, prompts=2, each=40, tokens=4
        )
        (payload,) = lay_out(
            spans, batch, learner.algorithm, config, world_size=1, seed=0, score=score
        )
        metrics = learner.train(payload)
        assert metrics["max_logprob_diff"] < 1e-4
        seen.append(metrics["kl_teacher"])
    assert np.mean(seen[-4:]) < 0.6 * np.mean(seen[:2]), seen
