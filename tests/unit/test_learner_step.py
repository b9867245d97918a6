"""One training step in one process: against NumPy, whatever the micro-batches, with and without signal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from learner_data import call, model_folder, random_batch, table
from transformers import AutoModelForCausalLM

import agl_ray as agl
from agl_ray.algorithms.algorithm import make_algorithm
from agl_ray.algorithms.base import Gain, LossInputs
from agl_ray.config.models import AlgorithmConfig, LearnerConfig
from agl_ray.learner.prepare import Payload, Update, lay_out
from agl_ray.learner.step import Learner
from agl_ray.trajectory.batch import GroupPlan, Member, TrainBatch
from agl_ray.trajectory.rows import build_rows
from agl_ray.types import RunError

ALGORITHM = AlgorithmConfig()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


@agl.policy_loss("test_regularizer")
def regularizer(inputs: LossInputs, config: AlgorithmConfig) -> Gain:
    return Gain(-((inputs.logprobs - inputs.engine_logprobs) ** 2))


def payload(
    spans: Any, batch: TrainBatch, config: LearnerConfig, algorithm: AlgorithmConfig = ALGORITHM
) -> Payload:
    made = make_algorithm(algorithm)
    return lay_out(spans, batch, made, config, world_size=1, seed=0)[0]


def flat(learner: Learner) -> torch.Tensor:
    return torch.cat([tensor.flatten() for _, tensor in learner.full_state()])


def loss_by_hand(folder: Path, spans: Any, batch: TrainBatch, algorithm: AlgorithmConfig) -> float:
    """The step's loss in float64: every row alone through plain transformers, every token in turn. All rows, zero signal included."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    built = build_rows(spans, batch.attempts)
    rewards = [member.reward for member in batch.members]
    means = [
        sum(m.reward for m in group.members) / len(group.members)
        for group in batch.groups
        for _ in group.members
    ]
    total, tokens = 0.0, 0
    for start, length, owner in zip(
        built.rows.starts, built.rows.lengths, built.attempt, strict=True
    ):
        ids = torch.from_numpy(built.rows.ids[start : start + length].astype(np.int64))[None]
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0]
        for place in range(1, length):
            if not built.rows.weights[start + place]:
                continue
            old = torch.log_softmax(logits[place - 1], -1)[ids[0, place]].item()
            k = math.exp(old - float(built.rows.columns["engine_logprobs"][start + place]))
            kept = algorithm.icepop_low <= k <= algorithm.icepop_high
            total -= (k if kept else 0.0) * (rewards[owner] - means[owner])
            tokens += 1
    return total / tokens


def test_the_loss_is_the_formula(folder: Path) -> None:
    spans, batch = random_batch(1)
    config = LearnerConfig(tokens_per_microbatch=40)
    metrics = Learner(ALGORITHM, config, folder).train(payload(spans, batch, config))
    assert metrics["loss"] == pytest.approx(loss_by_hand(folder, spans, batch, ALGORITHM), abs=1e-6)
    assert metrics["branches"] > 0  # the batch is no easy one
    assert 0 < metrics["corrected_fraction"] < 1


@pytest.mark.parametrize("minibatches", [1, 3])
def test_the_step_does_not_depend_on_the_micro_batches(folder: Path, minibatches: int) -> None:
    spans, batch = random_batch(2)
    after, seen = [], []
    for tokens in (1, 30, 100000):
        config = LearnerConfig(tokens_per_microbatch=tokens, minibatches=minibatches, lr=1e-3)
        learner = Learner(ALGORITHM, config, folder)
        laid_out = payload(spans, batch, config)
        assert (len(laid_out.updates[0].micros) == 1) == (tokens == 100000)
        seen.append(learner.train(laid_out))
        after.append(flat(learner))
    for other, metrics in zip(after[1:], seen[1:], strict=True):
        torch.testing.assert_close(other, after[0], atol=1e-5, rtol=0)
        for name in ("loss", "grad_norm", "entropy", "engine_kl", "ratio_mean"):
            assert metrics[name] == pytest.approx(seen[0][name], abs=1e-5)


def gradient(folder: Path, spans: Any, batch: TrainBatch, tokens: int) -> torch.Tensor:
    """The clipped gradient itself, read off a step of an optimiser that only keeps it."""
    config = LearnerConfig(tokens_per_microbatch=tokens, max_grad_norm=1e9)
    learner = Learner(ALGORITHM, config, folder)
    kept: list[torch.Tensor] = []
    learner.optimizer.step = lambda: kept.extend(  # type: ignore[method-assign]
        parameter.grad.flatten().clone() for parameter in learner.model.parameters()
    )
    learner.train(payload(spans, batch, config))
    return torch.cat(kept)


def test_the_gradient_does_not_depend_on_the_micro_batches(folder: Path) -> None:
    spans, batch = random_batch(3)
    whole = gradient(folder, spans, batch, 100000)
    assert whole.abs().max() > 1e-3
    for tokens in (1, 25, 60):
        torch.testing.assert_close(gradient(folder, spans, batch, tokens), whole, atol=1e-5, rtol=0)


def test_several_updates_make_the_ratio_move_and_share_one_scale(folder: Path) -> None:
    spans, batch = random_batch(4, groups=8)
    config = LearnerConfig(minibatches=4, lr=2e-2)
    laid_out = payload(spans, batch, config)
    learner = Learner(ALGORITHM, config, folder)
    metrics = learner.train(laid_out)
    assert (metrics["updates"], learner.updates, learner.version) == (4, 4, 1)
    assert scales(laid_out.updates) == {np.float32(4 / metrics["tokens_of_batch"])}
    assert sum(len(m.rows) for u in laid_out.updates for m in u.micros) == metrics["rows"]
    assert metrics["ratio_mean"] != 1.0
    assert metrics["clip_high_fraction"] + metrics["clip_low_fraction"] > 0


def scales(updates: list[Update]) -> set[float]:
    """What the counted tokens of these updates add to the loss, each value once."""
    return {
        float(scale)
        for update in updates
        for micro in update.micros
        for scale in micro.columns["scale"][micro.weights != 0]
    }


def zero_signal() -> tuple[Any, TrainBatch]:
    spans, batch = random_batch(5)
    groups = tuple(
        GroupPlan(
            group_id=group.group_id,
            members=tuple(
                Member(rollout_id=m.rollout_id, attempt_id=m.attempt_id, reward=1 / 3)
                for m in group.members
            ),
        )
        for group in batch.groups
    )
    return spans, TrainBatch(step=1, groups=groups)


def test_a_batch_without_signal_changes_nothing_and_makes_a_version(folder: Path) -> None:
    config = LearnerConfig(weight_decay=0.1)
    learner = Learner(ALGORITHM, config, folder)
    before = flat(learner)
    laid_out = payload(*zero_signal(), config)
    metrics = learner.train(laid_out)
    assert torch.equal(flat(learner), before)
    assert (metrics["zero_signal_groups"], metrics["rows"], metrics["updates"]) == (4, 0, 0)
    assert (learner.version, metrics["loss"], metrics["grad_norm"]) == (1, 0, 0)
    unseen = {
        "entropy",
        "kl_old",
        "engine_kl",
        "engine_kl_all",
        "max_logprob_diff",
        "max_token_age",
    }
    assert not unseen & metrics.keys()


def test_a_batch_without_groups_changes_nothing_and_makes_a_version(folder: Path) -> None:
    config = LearnerConfig()
    learner = Learner(ALGORITHM, config, folder)
    before = flat(learner)
    empty = payload(table([]), TrainBatch(step=1, groups=()), config)
    metrics = learner.train(empty)
    assert learner.version == 1
    assert torch.equal(flat(learner), before)
    assert (metrics["groups"], metrics["rollouts"], metrics["tokens_trained"]) == (0, 0, 0)


def test_refill_and_rewards_of_parts_do_not_go_together(folder: Path) -> None:
    spans, batch = random_batch(1)
    member = batch.members[0]
    attempt = {"rollout_id": member.rollout_id, "attempt_id": member.attempt_id}
    part = {
        "span_id": "r",
        "name": "reward",
        "kind": "reward",
        "reward": 1.0,
        "reward_target": "turn:1",
    }
    times = {"start_ns": 0, "end_ns": 1, "status": "OK"}
    both = pa.concat_tables([spans, table([attempt | part | times])])
    config, dapo = LearnerConfig(), AlgorithmConfig(name="dapo")
    assert payload(spans, batch, config, dapo).stats["rewards_of_parts"] == 0
    with pytest.raises(RunError, match=r"1 rewards of parts .* say algorithm.zero_signal: keep"):
        payload(both, batch, config, dapo)


def test_groups_without_signal_count_in_the_denominator_but_are_not_run(folder: Path) -> None:
    spans, batch = random_batch(6)  # the last group's rewards are all equal
    config = LearnerConfig()
    laid_out = payload(spans, batch, config)
    assert laid_out.stats["zero_signal_groups"] == 1
    in_forward = sum(float(m.weights.sum()) for m in laid_out.updates[0].micros)
    assert laid_out.stats["tokens_of_batch"] > in_forward
    assert scales(laid_out.updates) == {np.float32(1 / laid_out.stats["tokens_of_batch"])}


def test_a_users_loss_acts_on_rows_without_an_advantage_too(folder: Path) -> None:
    """A term of its own, such as a divergence, needs no reward."""
    config, algorithm = LearnerConfig(), AlgorithmConfig(loss="test_regularizer")
    spans, batch = zero_signal()
    metrics = Learner(algorithm, config, folder).train(payload(spans, batch, config, algorithm))
    assert metrics["zero_signal_groups"] == metrics["groups"]
    assert metrics["tokens_trained"] == metrics["tokens_of_batch"] > 0
    assert metrics["grad_norm"] > 0


def test_overlong_rows_are_dropped_after_the_advantages(folder: Path) -> None:
    long = call("a", list(range(30)), [1, 2, 3], attempt=("ro-1", "at-1"))
    short = call("a", [4], [5, 6], attempt=("ro-2", "at-2"))
    members = (
        Member(rollout_id="ro-1", attempt_id="at-1", reward=1.0),
        Member(rollout_id="ro-2", attempt_id="at-2", reward=0.0),
    )
    batch = TrainBatch(step=1, groups=(GroupPlan(group_id="g", members=members),))
    laid_out = payload(table([long, short]), batch, LearnerConfig(max_row_tokens=32))
    assert laid_out.stats["rows_dropped_overlong"] == 1
    assert laid_out.stats["tokens_dropped_overlong"] == 3
    (micro,) = laid_out.updates[0].micros
    assert micro.input_ids.tolist() == [[4, 5, 6]]
    # the dropped rollout's reward is still in the baseline
    assert micro.columns["advantages"].tolist() == [0, -0.5, -0.5]
    assert scales(laid_out.updates) == {0.5}


def test_rollouts_without_any_token_of_the_policy_are_counted(folder: Path) -> None:
    failed = call("a", [1], [2], attempt=("ro-1", "at-1"), status="ERROR")
    members = (
        Member(rollout_id="ro-1", attempt_id="at-1", reward=1.0),
        Member(rollout_id="ro-2", attempt_id="at-2", reward=0.0),
    )
    batch = TrainBatch(step=1, groups=(GroupPlan(group_id="g", members=members),))
    stats = payload(table([failed]), batch, LearnerConfig()).stats
    assert (stats["rows_dropped_empty"], stats["rollouts_without_calls"], stats["rows"]) == (
        1,
        1,
        0,
    )


def test_learner_and_engine_are_compared_on_tokens_of_the_current_version_only(
    folder: Path,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    with torch.no_grad():
        exact = torch.log_softmax(model(input_ids=ids).logits[0], -1)
    logprobs = [exact[place - 1, ids[0, place]].item() for place in range(2, 6)]
    logprobs[0] += 0.7  # made by an older version: no fault
    logprobs[2] += 0.01
    spans = [
        call("a", [1, 2], [3, 4, 5, 6], logprobs=logprobs, versions=[(0, -3), (1, 0)]),
        call("a", [1], [2], attempt=("ro-2", "at-2"), versions=[(0, -1)]),
    ]
    members = (
        Member(rollout_id="ro-1", attempt_id="at-1", reward=1.0),
        Member(rollout_id="ro-2", attempt_id="at-2", reward=0.0),
    )
    batch = TrainBatch(step=1, groups=(GroupPlan(group_id="g", members=members),))
    config = LearnerConfig()
    metrics = Learner(ALGORITHM, config, folder).train(payload(table(spans), batch, config))
    assert metrics["max_logprob_diff"] == pytest.approx(0.01, abs=1e-5)
    k3 = math.exp(-0.01) - 1 + 0.01
    assert metrics["engine_kl"] == pytest.approx(k3 / 3, abs=1e-7)
    assert (metrics["tokens_current"], metrics["max_token_age"]) == (3, 3)
    assert metrics["max_logprob_diff_all"] >= 0.7 - 1e-5
    assert metrics["engine_kl_all"] > metrics["engine_kl"]
    ages = {name: value for name, value in metrics.items() if name.startswith("token_age")}
    assert ages == {
        "token_age.0": 3,
        "token_age.1": 1,
        "token_age.3": 1,
        "token_age_mean": pytest.approx(4 / 5),
    }


def test_nothing_is_said_of_learner_and_engine_where_all_tokens_are_older(folder: Path) -> None:
    config = LearnerConfig()
    stale = {"versions": [(0, -1)]}
    spans = [call("a", [1], [2], **stale), call("a", [1], [3], attempt=("ro-2", "at-2"), **stale)]
    members = tuple(
        Member(rollout_id=f"ro-{i}", attempt_id=f"at-{i}", reward=float(i)) for i in (1, 2)
    )
    batch = TrainBatch(step=1, groups=(GroupPlan(group_id="g", members=members),))
    metrics = Learner(ALGORITHM, config, folder).train(payload(table(spans), batch, config))
    assert metrics["tokens_current"] == 0
    assert not {"max_logprob_diff", "engine_kl"} & metrics.keys()
    assert min(metrics[f"{name}_all"] for name in ("max_logprob_diff", "engine_kl")) > 0
    assert (metrics["max_token_age"], metrics["entropy"] > 0) == (1, True)


def test_a_payload_for_another_step_is_refused(folder: Path) -> None:
    spans, batch = random_batch(7, step=3)
    learner = Learner(ALGORITHM, LearnerConfig(), folder)
    with pytest.raises(RunError, match=r"training step 3: expected step 1"):
        learner.train(payload(spans, batch, LearnerConfig()))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_changes_no_weight(folder: Path, bad: float) -> None:
    config = LearnerConfig()
    learner = Learner(ALGORITHM, config, folder)
    before = flat(learner)
    wrong = payload(*random_batch(7), config)
    wrong.updates[0].micros[0].columns["scale"][:] = bad
    with pytest.raises(RunError, match=r"step 1, policy: .* finite gradient norm, got (nan|inf);"):
        learner.train(wrong)
    assert torch.equal(flat(learner), before)
    assert (learner.version, learner.updates) == (0, 0)


def test_bfloat16_stays_close_to_float32(folder: Path) -> None:
    spans, batch = random_batch(8)
    losses = []
    for dtype in ("float32", "bfloat16"):
        config = LearnerConfig(dtype=dtype)
        learner = Learner(ALGORITHM, config, folder)
        losses.append(learner.train(payload(spans, batch, config))["loss"])
        assert all(tensor.dtype == torch.float32 for _, tensor in learner.full_state())
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], abs=0.05)
