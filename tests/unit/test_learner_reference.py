"""Training beside a reference model: the term and the penalty by hand, and what a strong one does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_data import VOCABULARY, call, model_folder, random_batch, table
from transformers import AutoConfig, AutoModelForCausalLM

from agl_ray.algorithms.algorithm import make_algorithm
from agl_ray.config.credit import CreditConfig
from agl_ray.config.models import AlgorithmConfig, LearnerConfig
from agl_ray.config.trajectory import TrajectoryConfig
from agl_ray.learner.packing import token_logprobs
from agl_ray.learner.prepare import Payload, lay_out
from agl_ray.learner.reference import Known, penalties
from agl_ray.learner.step import Learner
from agl_ray.trajectory.batch import GroupPlan, Member, TrainBatch
from agl_ray.trajectory.credit import Credit
from agl_ray.trajectory.rows import build_rows
from agl_ray.types import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("other"), seed=1)


def algorithm(**kl: Any) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate({"correction": "none", "kl": kl})


def payload(spans: Any, batch: TrainBatch, config: LearnerConfig, of: AlgorithmConfig) -> Payload:
    return lay_out(spans, batch, make_algorithm(of), config, world_size=1, seed=0)[0]


def logprobs_by_hand(folder: Path, spans: Any, batch: TrainBatch) -> tuple[Any, Any]:
    """Of every trained token, row by row through plain transformers in float64: log p, and its rollout's index."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    built = build_rows(spans, batch.attempts)
    values, owners = [], []
    for start, length, owner in zip(
        built.rows.starts, built.rows.lengths, built.attempt, strict=True
    ):
        ids = torch.from_numpy(built.rows.ids[start : start + length].astype(np.int64))
        with torch.no_grad():
            every = torch.log_softmax(model(input_ids=ids[None], use_cache=False).logits[0], -1)
        for place in np.flatnonzero(built.rows.weights[start : start + length]).tolist():
            values.append(every[place - 1, ids[place]].item())
            owners.append(owner)
    return np.array(values), np.array(owners)


def test_the_term_in_the_loss_is_the_formula(folder: Path, other: Path) -> None:
    spans, batch = random_batch(1)
    config = LearnerConfig(tokens_per_microbatch=40)
    plain = AlgorithmConfig(correction="none")
    without = Learner(plain, config, folder).train(payload(spans, batch, config, plain))
    with_kl = algorithm(coefficient=0.5, reference=str(other))
    metrics = Learner(with_kl, config, folder).train(payload(spans, batch, config, with_kl))
    now, _ = logprobs_by_hand(folder, spans, batch)
    reference, _ = logprobs_by_hand(other, spans, batch)
    away = now - reference
    assert metrics["loss"] - without["loss"] == pytest.approx(0.25 * (away**2).mean(), rel=1e-4)
    k3 = np.exp(-away) + away - 1
    assert metrics["kl_reference"] == pytest.approx(k3.mean(), rel=1e-4)
    assert metrics["tokens_trained"] == metrics["tokens_of_batch"] > without["tokens_trained"]
    assert "kl_reference" not in without


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_penalty_is_taken_off_the_rewards_before_the_advantages(
    folder: Path, other: Path, estimator: str
) -> None:
    spans, batch = random_batch(2)
    with_kl = algorithm(coefficient=0.2, where="reward", estimator=estimator, reference=str(other))
    config = LearnerConfig(tokens_per_microbatch=40)
    learner = Learner(with_kl, config, folder)
    made: list[np.ndarray] = []
    plain = learner.algorithm.advantages_of

    def watched(inputs: Any) -> Any:
        made.append(inputs.rewards)
        return plain(inputs)

    learner.algorithm.advantages_of = watched  # type: ignore[method-assign]
    metrics = learner.train(payload(spans, batch, config, with_kl))
    now, owner = logprobs_by_hand(folder, spans, batch)
    away = now - logprobs_by_hand(other, spans, batch)[0]
    k = away if estimator == "k1" else np.exp(-away) + away - 1
    penalty = 0.2 * np.bincount(owner, weights=k, minlength=16)
    rewards = np.array([member.reward for member in batch.members]) - penalty
    np.testing.assert_allclose(made[-1], rewards, atol=1e-5)
    assert metrics["kl_penalty"] == pytest.approx(penalty.mean(), abs=1e-5)
    advantages = rewards - rewards.reshape(4, 4).mean(1).repeat(4)
    assert metrics["advantage_std"] == pytest.approx(advantages.std(), abs=1e-5)
    assert metrics["loss"] == pytest.approx(-advantages[owner].mean(), abs=1e-5)
    assert metrics["zero_signal_groups"] == 0  # equal rewards, other distances


@pytest.mark.parametrize("where", ["loss", "reward"])
def test_the_step_does_not_depend_on_the_micro_batches(
    folder: Path, other: Path, where: str
) -> None:
    spans, batch = random_batch(3)
    of = algorithm(coefficient=0.3, where=where, reference=str(other))
    after, seen = [], []
    for tokens in (20, 100000):
        config = LearnerConfig(tokens_per_microbatch=tokens, minibatches=2, lr=1e-3)
        learner = Learner(of, config, folder)
        seen.append(learner.train(payload(spans, batch, config, of)))
        after.append(torch.cat([tensor.flatten() for _, tensor in learner.full_state()]))
    torch.testing.assert_close(after[0], after[1], atol=1e-5, rtol=0)
    for name in ("loss", "grad_norm", "kl_reference", "kl_old"):
        assert seen[0][name] == pytest.approx(seen[1][name], abs=1e-5)
    assert seen[0]["kl_old"] > 0


def test_rows_that_share_their_beginnings_are_penalised_alike(folder: Path, other: Path) -> None:
    spans, batch = random_batch(5)
    of = algorithm(coefficient=0.3, where="reward", reference=str(other))
    seen = []
    for rows in ("merge-prefix", "per-call", "tree"):
        laid_out = lay_out(
            spans,
            batch,
            make_algorithm(of),
            LearnerConfig(),
            world_size=1,
            seed=0,
            trajectory=TrajectoryConfig.model_validate({"rows": rows}),
        )
        seen.append(Learner(of, LearnerConfig(), folder).train(laid_out[0]))
    for metrics in seen[1:]:
        for name in ("loss", "grad_norm", "kl_reference", "kl_penalty", "advantage_std"):
            assert metrics[name] == pytest.approx(seen[0][name], rel=1e-4), name


def test_where_calls_are_the_units_each_call_answers_for_its_own_tokens(
    folder: Path, other: Path
) -> None:
    spans, batch = random_batch(6)
    of = algorithm(coefficient=0.3, where="reward", reference=str(other))
    credit = Credit(CreditConfig(unit="call"))
    made = make_algorithm(of)
    laid_out = lay_out(spans, batch, made, LearnerConfig(), world_size=1, seed=0, credit=credit)[0]
    learner = Learner(of, LearnerConfig(), folder)
    (known,) = known_of(learner, laid_out)
    got = penalties(laid_out, [known], of.kl)
    now, _ = logprobs_by_hand(folder, spans, batch)
    away = now - logprobs_by_hand(other, spans, batch)[0]
    built = build_rows(spans, batch.attempts)
    units = credit.units(built.calls, spans, batch)
    unit = units.of_call[built.rows.columns["call"][built.rows.weights > 0]]
    np.testing.assert_allclose(got, 0.3 * np.bincount(unit, weights=away), atol=1e-5)
    assert len(got) > len(batch.members)


def known_of(learner: Learner, of: Payload) -> Known:
    """What the learner knows before the updates, here computed by it alone."""
    assert learner.reference is not None
    with torch.no_grad():
        return [
            [
                {
                    "old_logprobs": token_logprobs(learner.model, micro),
                    "reference_logprobs": learner.reference.logprobs(micro),
                }
                for micro in update.micros
            ]
            for update in of.updates
        ]


def train(learner: Learner, of: AlgorithmConfig, steps: range) -> list[dict[str, float]]:
    rows = []
    for step in steps:
        spans, batch = random_batch(4, step=step)
        rows.append(learner.train(payload(spans, batch, learner.config, of)))
    return rows


def play(learner: Learner, of: AlgorithmConfig, steps: int, rollouts: int = 96) -> float:
    """A bandit: after token 2, an even token is worth 1. Trains on tokens of the policy's own; returns what even tokens are worth at the end."""
    draws = torch.Generator().manual_seed(0)
    probabilities = torch.zeros(VOCABULARY)
    for step in range(1, steps + 1):
        with torch.no_grad():
            logits = learner.model(input_ids=torch.tensor([[2]]), use_cache=False).logits[0, -1]
        probabilities = torch.softmax(logits, -1)
        tokens = torch.multinomial(probabilities, rollouts, replacement=True, generator=draws)
        spans, members = [], []
        for i, token in enumerate(tokens.tolist()):
            logprob = probabilities[token].log().item()
            attempt = (f"ro-{i}", f"at-{i}")
            spans.append(call("a", [2], [token], attempt=attempt, logprobs=[logprob]))
            reward = float(token % 2 == 0)
            members.append(Member(rollout_id=attempt[0], attempt_id=attempt[1], reward=reward))
        batch = TrainBatch(step=step, groups=(GroupPlan(group_id="g", members=tuple(members)),))
        learner.train(payload(table(spans), batch, learner.config, of))
    return float(probabilities[::2].sum())


@pytest.mark.slow
def test_a_bandit_goes_to_the_known_optimum_and_no_further(folder: Path) -> None:
    """Of E[R] - b KL(pi || reference) it is pi ~ reference exp(R / b)."""
    config = LearnerConfig(lr=3e-3)

    def end(steps: int = 40, **kl: Any) -> float:
        of = algorithm(**kl)
        return play(Learner(of, config, folder), of, steps)

    start = end(1, coefficient=0.0)
    optimum = start * math.exp(1 / 0.7) / (start * math.exp(1 / 0.7) + 1 - start)
    assert end(coefficient=0.0) > 0.95 > optimum
    assert end(coefficient=0.7) == pytest.approx(optimum, abs=0.03)
    assert end(coefficient=0.7, where="reward") == pytest.approx(optimum, abs=0.03)
    # GRPO's term, whose gradient is biased, holds on too tightly here
    assert end(coefficient=0.7, estimator="k3", weighted=False) < optimum - 0.03


def test_a_resumed_run_keeps_the_reference_and_a_checkpoint_can_be_one(
    folder: Path, tmp_path: Path
) -> None:
    config = LearnerConfig(lr=1e-2)
    of = algorithm(coefficient=0.1)
    whole = Learner(of, config, folder)
    train(whole, of, range(1, 3))
    whole.save(tmp_path / "step-2")
    resumed = Learner(of, config, folder)
    resumed.load(tmp_path / "step-2")
    (one,), (two,) = (train(learner, of, range(3, 4)) for learner in (whole, resumed))
    assert one["kl_reference"] == two["kl_reference"] > 0
    assert one["loss"] == two["loss"]
    from_there = algorithm(coefficient=0.1, reference=str(tmp_path / "step-2"))
    fresh = Learner(from_there, config, folder)
    fresh.load(tmp_path / "step-2")
    (three,) = train(fresh, from_there, range(3, 4))
    assert three["kl_reference"] == pytest.approx(0, abs=1e-9)


def test_a_reference_of_another_vocabulary_or_shape_is_refused(
    folder: Path, other: Path, tmp_path: Path
) -> None:
    wide = AutoConfig.from_pretrained(folder)
    wide.vocab_size = VOCABULARY + 3
    AutoModelForCausalLM.from_config(wide).save_pretrained(tmp_path / "wide")
    (tmp_path / "wide" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    of = algorithm(coefficient=0.1, reference=str(tmp_path / "wide"))
    with pytest.raises(InputError, match="expected the run's vocabulary of 50 tokens, got 53"):
        Learner(of, LearnerConfig(), folder)
    Learner(AlgorithmConfig(), LearnerConfig(), tmp_path / "wide").save(tmp_path / "step-1")
    of = algorithm(coefficient=0.1, reference=str(tmp_path / "step-1"))
    with pytest.raises(InputError, match="expected one of this run's model"):
        Learner(of, LearnerConfig(), other)


def test_without_the_section_no_reference_is_loaded(folder: Path) -> None:
    assert Learner(AlgorithmConfig(), LearnerConfig(), folder).reference is None
