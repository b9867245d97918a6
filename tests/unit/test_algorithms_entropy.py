"""The entropy bonus: its share of the loss, its metric, its effect, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_data import model_folder, random_batch
from loss_streams import inputs_of, random_streams
from msgspec.structs import replace as change
from transformers import AutoModelForCausalLM

from agl_ray.algorithms.algorithm import make_algorithm
from agl_ray.config.load import validate
from agl_ray.config.models import AlgorithmConfig, LearnerConfig
from agl_ray.learner.packing import pack, token_outputs
from agl_ray.learner.prepare import lay_out
from agl_ray.learner.step import Learner
from agl_ray.trajectory.batch import TrainBatch
from agl_ray.trajectory.rows import build_rows
from agl_ray.types import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


def test_the_bonus_is_weighted_as_the_tokens_are_whatever_the_correction_says() -> None:
    inputs = inputs_of(random_streams(1))
    entropy = torch.rand(len(inputs.logprobs), dtype=torch.float64, requires_grad=True)
    plain = make_algorithm(AlgorithmConfig()).loss(inputs)
    algorithm = make_algorithm(AlgorithmConfig(entropy_coefficient=0.25))
    made = algorithm.loss(replace(inputs, entropy=entropy))
    share = inputs.weights * inputs.scale
    want = plain.loss - 0.25 * (share * entropy).sum()
    assert made.loss.item() == pytest.approx(want.item(), abs=1e-12)
    made.loss.backward()
    torch.testing.assert_close(entropy.grad, -0.25 * share)
    assert made.sums["entropy_full"].item() == pytest.approx(
        (inputs.weights * entropy).sum().item()
    )
    assert "entropy_full" not in plain.sums


def test_entropy_of_every_token_is_that_of_the_whole_distribution(folder: Path) -> None:
    spans, batch = random_batch(2)
    rows = build_rows(spans, batch.attempts).rows
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (micro,) = pack(rows, 100000)
    got = token_outputs(model, micro, entropy=True).entropy
    assert got is not None
    with torch.no_grad():
        logits = model(
            input_ids=torch.from_numpy(micro.input_ids),
            position_ids=torch.from_numpy(micro.position_ids),
            use_cache=False,
        ).logits[0]
    want = torch.distributions.Categorical(logits=logits[:-1].double()).entropy()
    counted = torch.from_numpy(micro.weights)[1:]
    torch.testing.assert_close(got[1:].double(), want * counted, atol=1e-6, rtol=0)
    assert got[0] == 0


def without_signal(seed: int, step: int) -> tuple[Any, TrainBatch]:
    spans, batch = random_batch(seed, step=step)
    groups = tuple(
        change(group, members=tuple(change(one, reward=0.5) for one in group.members))
        for group in batch.groups
    )
    return spans, change(batch, groups=groups)


def test_alone_it_raises_the_entropy_step_by_step(folder: Path) -> None:
    config = LearnerConfig(lr=3e-3)
    learner = Learner(AlgorithmConfig(entropy_coefficient=0.1), config, folder)
    seen = []
    for step in range(1, 5):
        spans, batch = without_signal(3, step)
        batches = lay_out(spans, batch, learner.algorithm, config, world_size=1, seed=0)
        seen.append(learner.train(batches[0]))
    entropies = [metrics["entropy_full"] for metrics in seen]
    assert entropies == sorted(entropies)
    assert entropies[-1] > entropies[0] + 0.01
    for metrics in seen:  # there is nothing else in this loss
        assert metrics["loss"] == pytest.approx(-0.1 * metrics["entropy_full"], abs=1e-6)
        assert metrics["tokens_trained"] == metrics["tokens_of_batch"]


def test_off_there_is_no_metric_and_rows_without_signal_are_not_run(folder: Path) -> None:
    config = LearnerConfig()
    learner = Learner(AlgorithmConfig(), config, folder)
    spans, batch = without_signal(3, 1)
    payload = lay_out(spans, batch, learner.algorithm, config, world_size=1, seed=0)[0]
    metrics = learner.train(payload)
    assert "entropy_full" not in metrics
    assert metrics["rows"] == 0


@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan"), "much"])
def test_a_coefficient_that_is_no_bonus_is_refused(value: object) -> None:
    given = {"model": {"path": "m"}, "algorithm": {"entropy_coefficient": value}}
    with pytest.raises(ConfigError, match=r"algorithm\.entropy_coefficient"):
        validate(given)
