"""Tokens chosen from a whole update: the same ones however the update is cut into micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from learner_data import model_folder, random_batch

from agl_ray.algorithms.algorithm import make_algorithm
from agl_ray.config.models import AlgorithmConfig, LearnerConfig
from agl_ray.learner.prepare import lay_out
from agl_ray.learner.step import Learner


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


def step(folder: Path, tokens: int, given: dict[str, Any]) -> tuple[dict[str, float], torch.Tensor]:
    of = AlgorithmConfig.model_validate({"correction": "none", **given})
    config = LearnerConfig(tokens_per_microbatch=tokens, minibatches=2, lr=1e-3)
    spans, batch = random_batch(3)
    learner = Learner(of, config, folder)
    laid_out = lay_out(spans, batch, make_algorithm(of), config, world_size=1, seed=0)[0]
    metrics = learner.train(laid_out)
    return metrics, torch.cat([tensor.flatten() for _, tensor in learner.full_state()])


@pytest.mark.parametrize(
    "given",
    [
        {"name": "clip_cov", "cov_share": 0.1, "cov_low": 0.1},
        {"name": "kl_cov", "cov_share": 0.1},
    ],
)
def test_the_step_does_not_depend_on_the_micro_batches(folder: Path, given: dict[str, Any]) -> None:
    small, after_small = step(folder, 20, given)
    large, after_large = step(folder, 100000, given)
    torch.testing.assert_close(after_small, after_large, atol=1e-5, rtol=0)
    for name in ("loss", "grad_norm", "cov_fraction"):
        assert small[name] == pytest.approx(large[name], abs=1e-5)
    assert 0.08 < large["cov_fraction"] < 0.11
    assert large["tokens_trained"] == large["tokens_of_batch"]
    plain, _ = step(folder, 100000, {"normalize": "group"})
    assert plain["grad_norm"] != large["grad_norm"]
    assert "cov_fraction" not in plain
