"""Rows in verl's form, and its metrics, as far as neither needs verl."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from learner_data import random_batch

from agl_ray.algorithms.algorithm import make_algorithm
from agl_ray.algorithms.base import LossInputs
from agl_ray.config.algorithm import AlgorithmConfig
from agl_ray.config.models import LearnerConfig
from agl_ray.learner.packing import Packed, pack
from agl_ray.learner.prepare import lay_out
from agl_ray.learner.verl_metrics import StepTotals
from agl_ray.learner.verl_rows import gather_rows, token_values
from agl_ray.trajectory.ragged import Rows
from agl_ray.types import RunError


def rows(temperature: list[float] | None = None) -> list[Packed]:
    """[prompt 2, trained 1, context 1, trained 1] and [prompt 1, trained 2], one micro-batch each."""
    columns = {"versions": np.array([0, 0, 0, 0, 1, 0, 1, 1])}
    if temperature is not None:
        columns["temperature"] = np.array(temperature, np.float32)
    made = Rows(
        np.arange(10, 18, dtype=np.int32),
        np.array([5, 3]),
        np.array([0, 0, 1, 0, 1, 0, 1, 1], np.float32),
        columns,
    )
    return pack(made, 5)


def test_a_prompt_ends_before_the_first_trained_token() -> None:
    got = gather_rows(rows())
    assert got.ids.tolist() == list(range(10, 18))
    assert got.prompts.tolist() == [2, 1]
    assert got.in_response.tolist() == [False, False, True, True, True, False, True, True]
    assert (got.num_trained_rows, got.temperature.tolist()) == (2, [1, 1])


def test_idle_rows_fill_up_and_count_nothing() -> None:
    got = gather_rows(rows(), at_least=4)
    assert got.lengths.tolist() == [5, 3, 2, 2]
    assert got.prompts.tolist() == [2, 1, 1, 1]
    assert (got.weights.sum(), got.num_trained_rows) == (4, 2)
    assert len(got.columns["versions"]) == len(got.ids) == 12


def test_no_trained_token_of_a_batch_is_in_a_prompt() -> None:
    algorithm, config = make_algorithm(AlgorithmConfig()), LearnerConfig(tokens_per_microbatch=50)
    for seed in range(5):
        payloads = lay_out(*random_batch(seed), algorithm, config, world_size=2, seed=0)
        for payload in payloads:
            got = gather_rows(payload.updates[0].micros)
            assert got.in_response[got.weights > 0].all()
            assert got.weights.sum() == sum(m.weights.sum() for m in payload.updates[0].micros)


def test_a_row_has_one_temperature_where_it_is_trained() -> None:
    context = [0, 0, 0.5, 0, 0.5, 0, 1, 1]
    assert gather_rows(rows(context)).temperature.tolist() == [0.5, 1]
    mixed = [0, 0, 0.5, 0, 0.7, 0, 1, 1]
    with pytest.raises(RunError, match=r"one temperature per row.*trajectory\.rows: per-call"):
        gather_rows(rows(mixed))


def test_values_of_verl_stand_one_place_before_their_token() -> None:
    got = gather_rows(rows())
    values = torch.arange(8.0)
    nested = torch.nested.nested_tensor_from_jagged(values, offsets=torch.tensor([0, 5, 8]))
    assert token_values(nested, got).tolist() == [0, 0, 1, 0, 3, 0, 5, 6]


def test_metrics_compare_with_the_engine_on_tokens_of_the_current_version() -> None:
    got = gather_rows(rows())
    weights = torch.from_numpy(got.weights)
    nothing = torch.zeros(8)
    inputs = LossInputs(
        logprobs=torch.where(weights > 0, -1.0, 0.0),
        old_logprobs=torch.where(weights > 0, -1.0, 0.0),
        engine_logprobs=torch.tensor([0, 0, -9, 0, -1.5, 0, -1, -1]),
        advantages=nothing,
        weights=weights,
        scale=nothing,
        sequence=torch.from_numpy(got.row_of_token),
        num_sequences=2,
    )
    totals = StepTotals(1, "cpu")
    totals.add_tokens(inputs, torch.from_numpy(got.columns["versions"]), 1)
    totals.add_ratio(nothing, weights, torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]))
    totals.add_update({"loss": [0.25, 0.5], "metrics": {"grad_norm": 2.0}}, "step 1")
    made = totals.metrics(1)
    assert (made["tokens_trained"], made["tokens_current"]) == (4, 3)
    assert (made["max_logprob_diff"], made["max_token_age"]) == (0.5, 1)
    assert (made["entropy"], made["ratio_mean"], made["corrected_fraction"]) == (1, 1, 0.25)
    assert (made["loss"], made["grad_norm"], made["updates"]) == (0.75, 2, 1)
    assert made["engine_kl"] == pytest.approx((np.exp(0.5) - 0.5 - 1) / 3, abs=1e-6)
    assert made["max_logprob_diff_all"] == 8
    later = StepTotals(1, "cpu")
    later.add_tokens(inputs, torch.from_numpy(got.columns["versions"]), 9)
    assert not {"engine_kl", "max_logprob_diff"} & later.metrics(1).keys()
    assert not {"entropy", "max_token_age"} & StepTotals(1, "cpu").metrics(0).keys()


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_a_norm_that_is_no_number_ends_the_step(norm: float) -> None:
    totals = StepTotals(1, "cpu")
    output = {"loss": [0.25], "metrics": {"grad_norm": norm}}
    text = r"^training step 3, policy: expected a finite gradient norm, got (nan|inf); no weight was changed by this update\."
    with pytest.raises(RunError, match=text):
        totals.add_update(output, "training step 3, policy")
