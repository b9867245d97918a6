"""The critic in one process: its values row by row, its step by hand, what it does not depend on, and what it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_data import call, model_folder, random_batch, table

import agl_ray as agl
from agl_ray.algorithms.algorithm import make_algorithm
from agl_ray.algorithms.base import CriticAdvantages
from agl_ray.config.credit import CreditConfig
from agl_ray.config.models import AlgorithmConfig, LearnerConfig
from agl_ray.config.trajectory import TrajectoryConfig
from agl_ray.learner.critic import token_values
from agl_ray.learner.packing import pack
from agl_ray.learner.prepare import Payload, lay_out
from agl_ray.learner.step import Learner
from agl_ray.trajectory.batch import GroupPlan, Member, TrainBatch
from agl_ray.trajectory.credit import Credit
from agl_ray.trajectory.rows import build_rows
from agl_ray.types import ConfigError, InputError, RunError

PPO = AlgorithmConfig.model_validate({"name": "ppo", "normalize": "none", "gae_lambda": 0.9})
OF_CRITIC = ("value_loss", "value_mean", "return_mean", "explained_variance", "critic_grad_norm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


def payload(
    spans: Any,
    batch: TrainBatch,
    config: LearnerConfig,
    algorithm: AlgorithmConfig = PPO,
    credit: CreditConfig | None = None,
    **more: Any,
) -> Payload:
    made = make_algorithm(algorithm)
    more = {"world_size": 1, "seed": 0, "credit": Credit(credit), **more}
    return lay_out(spans, batch, made, config, **more)[0]


def learner_config(**critic: Any) -> LearnerConfig:
    return LearnerConfig.model_validate({"critic": critic})


def flat(model: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def taught(folder: Path, steps: int = 2) -> Learner:
    """A learner whose critic no longer says 0 everywhere."""
    learner = Learner(PPO, learner_config(lr=1e-2, alone_steps=steps, max_grad_norm=1e9), folder)
    for step in range(1, steps + 1):
        learner.train(payload(*random_batch(1, step=step), learner.config))
    return learner


def test_a_gradient_of_the_critic_that_is_no_number_changes_neither_model(folder: Path) -> None:
    learner = Learner(PPO, learner_config(), folder)
    assert learner.critic is not None
    before = [flat(learner.model), flat(learner.critic.model)]
    wrong = payload(*random_batch(1), learner.config)
    wrong.updates[0].micros[0].columns["scale"][:] = np.nan
    with pytest.raises(RunError, match=r"critic, update 1 of the run: .* got nan"):
        learner.train(wrong)
    after = [flat(learner.model), flat(learner.critic.model)]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_packed_values_are_those_of_each_row_alone(folder: Path) -> None:
    model = taught(folder).critic.model  # type: ignore[union-attr]
    rows = build_rows(*(lambda spans, batch: (spans, batch.attempts))(*random_batch(2))).rows
    together = {}
    for micro in pack(rows, 70):
        values = token_values(model, micro).detach().numpy()
        for row, part in zip(micro.rows, np.split(values, np.cumsum(micro.lengths)), strict=False):
            together[int(row)] = part
    for row in range(len(rows)):
        ids = torch.from_numpy(rows.take(np.array([row])).ids.astype(np.int64))[None]
        with torch.no_grad():
            alone = model(input_ids=ids, use_cache=False).logits[0, :, 0].numpy()
        begin = rows.starts[row]
        weights = rows.weights[begin : begin + rows.lengths[row]]
        np.testing.assert_allclose(
            together[row], weights * np.append(0, alone[:-1]), rtol=0, atol=1e-5
        )
        assert abs(together[row]).max() > 1e-2


def test_a_tied_head_becomes_the_critics_own(tmp_path: Path) -> None:
    tied = model_folder(tmp_path / "tied", tied=True)
    learner = taught(tied, steps=1)
    assert learner.critic is not None
    model = learner.critic.model
    assert model.get_output_embeddings().weight.shape == (1, 32)
    assert model.get_input_embeddings().weight.shape == (50, 32)
    learner.save(tmp_path / "step-1")
    again = Learner(PPO, learner.config, tied)
    again.load(tmp_path / "step-1")
    assert torch.equal(flat(again.critic.model), flat(model))  # type: ignore[union-attr]


def test_the_first_values_are_zero_and_the_advantage_is_the_reward(folder: Path) -> None:
    spans, batch = random_batch(3)
    config = learner_config()
    learner = Learner(PPO.model_copy(update={"gae_lambda": 1.0}), config, folder)
    laid_out = payload(spans, batch, config)
    assert learner.critic is not None
    judged, seen = learner.critic.step(laid_out, [], _untimed(), 1.0)
    assert (seen["value_mean"], seen["explained_variance"]) == (0, 0)
    rewards = [member.reward for member in batch.members]
    assert seen["advantage_max"] == pytest.approx(max(rewards))
    for micro in judged.updates[0].micros:
        there = micro.weights != 0
        np.testing.assert_array_equal(
            micro.columns["advantages"][there], micro.columns["returns"][there]
        )
        assert not micro.columns["advantages"][~there].any()
        assert set(micro.columns["returns"][there]) <= {np.float32(reward) for reward in rewards}


class _untimed:
    def __call__(self, _: str) -> _untimed:
        return self

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def test_rows_without_any_signal_are_run_and_teach_the_critic(folder: Path) -> None:
    spans, batch = random_batch(4)  # the last group's rewards are all equal
    config = learner_config()
    laid_out = payload(spans, batch, config)
    assert laid_out.stats["zero_signal_groups"] == 0
    tokens = sum(float(micro.weights.sum()) for micro in laid_out.updates[0].micros)
    assert laid_out.episodes is not None
    assert laid_out.stats["tokens_of_batch"] == tokens == len(laid_out.episodes.rewards)
    assert laid_out.episodes.rewards.sum() == pytest.approx(sum(m.reward for m in batch.members))
    metrics = Learner(PPO, config, folder).train(laid_out)
    assert (metrics["critic_updates"], metrics["updates"]) == (1, 1)
    assert metrics["value_loss"] > 0


def gradients(learner: Learner, laid_out: Payload) -> tuple[torch.Tensor, dict[str, float]]:
    """Of the policy and of the critic in every update, read off optimisers that only keep them; and the metrics."""
    assert learner.critic is not None
    kept: list[torch.Tensor] = []
    for part in (learner, learner.critic):
        parameters = list(part.model.parameters())
        part.optimizer.step = lambda parameters=parameters: kept.extend(  # type: ignore[method-assign]
            parameter.grad.flatten().clone() for parameter in parameters
        )
    metrics = learner.train(laid_out)
    return torch.cat(kept), metrics


@pytest.mark.parametrize("minibatches", [1, 3])
def test_the_gradients_do_not_depend_on_micro_batches_or_rows(
    folder: Path, minibatches: int
) -> None:
    seen = []
    for tokens, rows in ((1, "merge-prefix"), (60, "tree"), (10**6, "per-call")):
        given = {"tokens_per_microbatch": tokens, "minibatches": minibatches, "max_grad_norm": 1e9}
        config = LearnerConfig.model_validate(given)
        trajectory = TrajectoryConfig.model_validate({"rows": rows})
        laid_out = payload(*random_batch(5, step=3), config, trajectory=trajectory)
        seen.append(gradients(taught(folder), laid_out))
    (whole, metrics), *others = seen
    assert metrics["critic_updates"] == minibatches
    for gradient, other in others:
        torch.testing.assert_close(gradient, whole, atol=1e-5, rtol=0)
        for name in ("loss", *OF_CRITIC):
            assert other[name] == pytest.approx(metrics[name], abs=1e-5), name


def test_several_updates_make_the_value_clip_act(folder: Path) -> None:
    config = LearnerConfig.model_validate(
        {"minibatches": 2, "critic": {"lr": 1e-2, "epochs": 3, "value_clip": 0.05}}
    )
    metrics = Learner(PPO, config, folder).train(payload(*random_batch(5), config))
    assert (metrics["critic_updates"], metrics["updates"]) == (6, 2)
    assert 0 < metrics["value_clip_fraction"] < 1


def test_the_critic_alone_leaves_the_policy_as_it_is(folder: Path) -> None:
    learner = Learner(PPO, learner_config(alone_steps=1), folder)
    before = flat(learner.model)
    names = [name for name, _ in learner.full_state()]
    first = learner.train(payload(*random_batch(6, step=1), learner.config))
    assert torch.equal(flat(learner.model), before)
    assert (first["updates"], first["critic_updates"], learner.version) == (0, 1, 1)
    second = learner.train(payload(*random_batch(6, step=2), learner.config))
    assert not torch.equal(flat(learner.model), before)
    assert (second["updates"], learner.updates) == (1, 1)
    assert [name for name, _ in learner.full_state()] == names  # the policy's, nothing else


def two_calls() -> tuple[Any, TrainBatch]:
    """A rollout of reward 1 with two calls of two tokens each, the second a continuation of the first."""
    spans = [
        call("a", [1, 2, 3], [4, 5]),
        call("b", [6, 7], [8, 9], parent="a", shared=5),
    ]
    member = Member(rollout_id="ro-1", attempt_id="at-1", reward=1.0)
    return table(spans), TrainBatch(step=1, groups=(GroupPlan(group_id="g", members=(member,)),))


@pytest.mark.parametrize(
    ("credit", "over", "lengths", "rewards"),
    [
        ({}, "unit", [4], [0, 0, 0, 1]),
        ({"unit": "call"}, "unit", [2, 2], [0, 1, 0, 1]),
        ({"unit": "call", "outcome": "last"}, "unit", [2, 2], [0, 0, 0, 1]),
        ({"unit": "call", "outcome": "last"}, "rollout", [4], [0, 0, 0, 1]),
    ],
)
@pytest.mark.parametrize("rows", ["merge-prefix", "per-call"])
def test_tool_results_take_no_time_and_calls_are_turns_of_one_episode(
    credit: dict[str, Any], over: str, lengths: list[int], rewards: list[float], rows: str
) -> None:
    algorithm = AlgorithmConfig.model_validate({"name": "ppo", "gae_over": over})
    laid_out = payload(
        *two_calls(),
        LearnerConfig(),
        algorithm,
        CreditConfig.model_validate(credit),
        trajectory=TrajectoryConfig.model_validate({"rows": rows}),
    )
    assert laid_out.episodes is not None
    assert laid_out.episodes.lengths.tolist() == lengths
    assert laid_out.episodes.rewards.tolist() == rewards
    (micro,) = laid_out.updates[0].micros
    placed = {int(i): int(p) for i, p in zip(micro.input_ids[0], micro.columns["place"], strict=True)
              if p >= 0}  # fmt: skip
    assert placed == {4: 0, 5: 1, 8: 2, 9: 3}


def test_what_an_overlong_row_earned_is_paid_to_the_tokens_that_are_left() -> None:
    laid_out = payload(
        *two_calls(),
        LearnerConfig(max_row_tokens=6),
        trajectory=TrajectoryConfig.model_validate({"rows": "per-call"}),
    )
    assert laid_out.stats["tokens_dropped_overlong"] == 2
    assert laid_out.episodes is not None
    assert laid_out.episodes.rewards.tolist() == [0, 1]


def test_the_critic_learns_what_is_to_be_expected(folder: Path) -> None:
    """A bandit: a context, one token, a reward that is 1 with a chance that hangs on the context alone."""
    chances = {10: 0.1, 20: 0.5, 30: 0.9}
    rng = np.random.default_rng(0)
    config = learner_config(lr=1e-3, alone_steps=10**6, value_clip=None)
    learner = Learner(PPO, config, folder)
    for step in range(1, 61):
        spans, groups = [], []
        for context, chance in chances.items():
            members = []
            for rollout in range(24):
                attempt = (f"ro-{context}-{rollout}", "at-1")
                token = int(rng.integers(0, 50))
                spans.append(call("a", [context, 1], [token], attempt=attempt))
                reward = float(rng.random() < chance)
                members.append(Member(rollout_id=attempt[0], attempt_id="at-1", reward=reward))
            groups.append(GroupPlan(group_id=str(context), members=tuple(members)))
        metrics = learner.train(
            payload(table(spans), TrainBatch(step=step, groups=tuple(groups)), config)
        )
    assert learner.critic is not None
    for context, chance in chances.items():
        ids = torch.tensor([[context, 1]])
        with torch.no_grad():
            value = learner.critic.model(input_ids=ids, use_cache=False).logits[0, -1, 0].item()
        assert value == pytest.approx(chance, abs=0.15)
    assert metrics["explained_variance"] > 0.2  # of at most 0.43 that the context tells


@pytest.mark.parametrize("alone", [0, 1])
def test_a_resumed_critic_goes_on_as_if_never_stopped(
    folder: Path, tmp_path: Path, alone: int
) -> None:
    config = LearnerConfig.model_validate(
        {"minibatches": 2, "critic": {"warmup_steps": 50, "alone_steps": alone, "epochs": 2}}
    )
    whole = Learner(PPO, config, folder)
    whole.train(payload(*random_batch(7, step=1), config))
    whole.save(tmp_path / "step-1")
    rest = Learner(PPO, config, folder)
    rest.load(tmp_path / "step-1")
    pair = [learner.train(payload(*random_batch(7, step=2), config)) for learner in (whole, rest)]
    for name in ("loss", "grad_norm", "critic_lr", "value_clip_fraction", *OF_CRITIC):
        assert pair[0][name] == pair[1][name], name
    assert (
        pair[0]["critic_lr"] == config.critic.lr * 8 / 50
    )  # two steps, two epochs, two minibatches
    for one, other in zip(flat(whole.critic.model), flat(rest.critic.model), strict=True):  # type: ignore[union-attr]
        assert one == other


def test_the_divergence_is_taken_off_the_reward_of_each_token(folder: Path) -> None:
    """With lambda 1 and values of 0 a return is what the tokens from there on earn."""
    kl = {"coefficient": 0.5, "where": "reward", "estimator": "k3"}
    algorithm = AlgorithmConfig.model_validate({"name": "ppo", "normalize": "none", "kl": kl})
    config = LearnerConfig.model_validate({"lr": 1e-2, "critic": {"lr": 1e-12}})
    learner = Learner(algorithm, config, folder)
    seen = [
        learner.train(payload(*random_batch(6, step=step), config, algorithm)) for step in (1, 2)
    ]
    assert seen[0]["kl_penalty"] == pytest.approx(0, abs=1e-6)  # the policy is the reference
    episodes = seen[1]["rollouts"]
    penalty = 0.5 * seen[1]["kl_reference"] * seen[1]["tokens_trained"] / episodes
    assert seen[1]["kl_penalty"] == pytest.approx(penalty, rel=1e-4)
    assert penalty > 1e-3
    laid_out = payload(*random_batch(6, step=2), config)
    assert laid_out.episodes is not None
    free = make_algorithm(PPO.model_copy(update={"gae_lambda": 1.0})).critic_advantages(
        laid_out.episodes, np.zeros(len(laid_out.episodes.rewards))
    )
    assert free.returns.mean() - penalty < seen[1]["return_mean"] < free.returns.mean()


def test_a_checkpoint_without_a_critic_is_refused(folder: Path, tmp_path: Path) -> None:
    Learner(AlgorithmConfig(), LearnerConfig(), folder).save(tmp_path / "step-0")
    with pytest.raises(InputError, match="expected a critic, found none"):
        Learner(PPO, LearnerConfig(), folder).load(tmp_path / "step-0")


def test_a_critic_that_nobody_asks_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"learner\.critic acts with a critic's advantage only"):
        Learner(AlgorithmConfig(), learner_config(lr=1e-4), folder)
    learner = Learner(PPO, LearnerConfig(), folder)
    laid_out = payload(*random_batch(8), LearnerConfig(), AlgorithmConfig())
    with pytest.raises(RunError, match="expected a payload with episodes"):
        learner.train(laid_out)


@agl.advantage("test_one_step", baseline="critic")
def one_step(episodes: Any, values: Any, config: AlgorithmConfig) -> CriticAdvantages:
    deltas = episodes.rewards + episodes.next_of(values) - values
    return CriticAdvantages(deltas, values + deltas)


def test_a_registered_function_may_have_a_critic_as_its_baseline(folder: Path) -> None:
    seen = []
    for name in ({"advantage": "test_one_step"}, {"advantage": "gae", "gae_lambda": 0.0}):
        algorithm = AlgorithmConfig.model_validate(name)
        learner = Learner(algorithm, LearnerConfig(), folder)
        for step in (1, 2):
            laid_out = payload(*random_batch(9, step=step), LearnerConfig(), algorithm)
            metrics = learner.train(laid_out)
        seen.append((metrics["loss"], metrics["value_loss"]))
    assert seen[0] == seen[1]
    assert seen[0][0] != 0
