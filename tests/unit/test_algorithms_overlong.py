"""Soft overlong punishment: against the paper's three cases in float64, on its way to every advantage, and where it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learner_data import call, random_batch, table

from agl_ray.algorithms.algorithm import make_algorithm
from agl_ray.algorithms.overlong_shaping import overlong_penalty
from agl_ray.config.algorithm import AlgorithmConfig
from agl_ray.config.credit import CreditConfig
from agl_ray.config.load import validate
from agl_ray.config.models import LearnerConfig
from agl_ray.learner.prepare import Payload, lay_out, with_advantages
from agl_ray.spans.schema import ROLE_KIND
from agl_ray.trajectory.batch import GroupPlan, Member, TrainBatch
from agl_ray.trajectory.credit import Credit
from agl_ray.types import ConfigError
from agl_ray.types.rollout import replace

BASE = {"model": {"path": "m"}}
ON = {"overlong_tokens": 12, "overlong_buffer": 8}


def algorithm(**given: Any) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate(given)


def by_hand(tokens: int, longest: int, buffer: int) -> float:
    """Equation 13 of the paper."""
    if tokens <= longest - buffer:
        return 0.0
    if tokens <= longest:
        return ((longest - buffer) - tokens) / buffer
    return -1.0


@pytest.mark.parametrize(("longest", "buffer"), [(12, 8), (20480, 4096), (7, 1)])
def test_the_penalty_is_the_papers(longest: int, buffer: int) -> None:
    config = algorithm(overlong_tokens=longest, overlong_buffer=buffer, overlong_factor=0.5)
    tokens = np.unique(np.linspace(0, longest + 3, 500).astype(np.int64))
    wanted = [0.5 * by_hand(n, longest, buffer) for n in tokens.tolist()]
    np.testing.assert_allclose(overlong_penalty(tokens, config), wanted, rtol=0, atol=1e-12)
    assert (min(wanted), max(wanted)) == (-0.5, 0.0)


def laid_out(spans: Any, batch: TrainBatch, config: AlgorithmConfig, **more: Any) -> Payload:
    made = make_algorithm(config)
    return lay_out(spans, batch, made, LearnerConfig(), world_size=1, seed=0, **more)[0]


def sampled(spans: Any, batch: TrainBatch) -> list[int]:
    """Response tokens of each rollout of the batch."""
    found = dict.fromkeys(batch.attempts, 0)
    for one in spans.to_pylist():
        found[one["rollout_id"], one["attempt_id"]] += len(one["response_ids"] or [])
    return list(found.values())


def paid_before(batch: TrainBatch, tokens: list[int], factor: float) -> TrainBatch:
    """The batch of rollouts that earn what `batch`'s do less the paper's penalty."""
    left = [
        replace(m, reward=m.reward + factor * by_hand(n, 12, 8))
        for m, n in zip(batch.members, tokens, strict=True)
    ]
    groups = []
    for plan in batch.groups:
        groups.append(GroupPlan(group_id=plan.group_id, members=tuple(left[: len(plan.members)])))
        left = left[len(plan.members) :]
    return TrainBatch(step=batch.step, groups=tuple(groups))


@pytest.mark.parametrize("advantage", ["group", "rloo", "opo", "reward", "gae", "mine"])
def test_every_advantage_is_of_the_punished_rewards(advantage: str, tmp_path: Path) -> None:
    if advantage == "mine":
        file = tmp_path / "mine.py"
        file.write_text("def squared(inputs, config):\n    return inputs.rewards**2\n")
        advantage = f"{file}:squared"
    spans, batch = random_batch(3)
    tokens = sampled(spans, batch)
    plain = algorithm(advantage=advantage)
    punished = algorithm(advantage=advantage, **ON, overlong_factor=0.5)
    made = laid_out(spans, batch, punished)
    wanted = laid_out(spans, paid_before(batch, tokens, 0.5), plain)
    if made.episodes is not None and wanted.episodes is not None:
        np.testing.assert_allclose(made.episodes.rewards, wanted.episodes.rewards, atol=1e-12)
        assert made.episodes.rewards.min() < 0
    for mine, theirs in zip(made.updates[0].micros, wanted.updates[0].micros, strict=True):
        both = mine.columns["advantages"], theirs.columns["advantages"]
        np.testing.assert_allclose(*both, rtol=0, atol=1e-6)
    off = [-0.5 * by_hand(n, 12, 8) for n in tokens]
    assert 0 < sum(each > 0 for each in off) < len(off)
    assert made.stats["overlong_penalty"] == pytest.approx(np.mean(off), abs=1e-12)
    assert made.stats["overlong_share"] == np.mean([each > 0 for each in off])
    assert "overlong_share" not in wanted.stats


def test_a_divergence_is_taken_off_the_punished_rewards() -> None:
    """`kl.where: reward` makes the advantages later, of the same units."""
    spans, batch = random_batch(4)
    config = algorithm(**ON, kl={"coefficient": 0.1, "where": "reward"})
    late = laid_out(spans, batch, config)
    assert late.units is not None
    made = with_advantages(late, np.zeros(len(late.units.reward)), make_algorithm(config))
    straight = laid_out(spans, batch, algorithm(**ON))
    found = {key: straight.stats[key] for key in ("advantage_std", "advantage_max")}
    assert found["advantage_std"] > 0
    assert {key: made.stats[key] for key in found} == pytest.approx(found)


def one_rollout(calls: list[dict[str, Any]]) -> tuple[Any, TrainBatch]:
    member = Member(rollout_id="ro-1", attempt_id="at-1", reward=1.0)
    return table(calls), TrainBatch(step=1, groups=(GroupPlan(group_id="g", members=(member,)),))


def test_only_what_the_policy_sampled_counts_whatever_is_dropped() -> None:
    calls = [
        call("a", range(40), range(5), attempt=("ro-1", "at-1")),
        call("b", range(40), range(5), attempt=("ro-1", "at-1")),
        call("c", range(4), range(9), attempt=("ro-1", "at-1"), status="ERROR"),
        call("d", range(4), range(9), attempt=("ro-1", "at-1"), attributes={ROLE_KIND: "frozen"}),
    ]
    spans, batch = one_rollout(calls)
    config = algorithm(advantage="reward", **ON)
    short = LearnerConfig(max_row_tokens=20)
    (made,) = lay_out(spans, batch, make_algorithm(config), short, world_size=1, seed=0)
    assert made.stats["rows_dropped_overlong"] == 2  # its rows hold 45 tokens each
    assert made.stats["overlong_penalty"] == -by_hand(10, 12, 8)
    assert made.stats["advantage_mean"] == 1 + by_hand(10, 12, 8)


def test_a_unit_is_punished_for_its_own_calls() -> None:
    calls = [call(f"c{n}", [1, 2], range(n), attempt=("ro-1", "at-1")) for n in (3, 8, 13)]
    spans, batch = one_rollout(calls)
    config = algorithm(advantage="reward", **ON)
    made = laid_out(spans, batch, config, credit=Credit(CreditConfig(unit="call")))
    assert made.stats["overlong_penalty"] == pytest.approx((0 + 0.5 + 1) / 3)
    assert made.stats["overlong_share"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"overlong_tokens": 12}, "overlong_tokens acts with both"),
        ({"overlong_buffer": 12}, "overlong_buffer acts with both"),
        ({"overlong_factor": 0.5}, "overlong_factor acts with both"),
        ({"overlong_tokens": 8, "overlong_buffer": 8}, r"overlong_buffer: expected less than .*8"),
        ({**ON, "name": "maxrl"}, "needs rewards of 0 or more"),
        ({**ON, "name": "opd", "teacher": {"base_url": "http://t/v1", "model": "m"}}, "no effect"),
    ],
)
def test_what_would_do_nothing_or_harm_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate({**BASE, "algorithm": given})


def test_a_length_that_no_call_can_have_is_refused() -> None:
    base = {**BASE, "algorithm": ON, "credit": {"unit": "call"}}
    assert validate({**base, "rollout": {"max_tokens": 5}}).algorithm.overlong_tokens == 12
    with pytest.raises(ConfigError, match=r"calls of more than 4 tokens, .* none has more than 4"):
        validate({**base, "rollout": {"max_tokens": 4}})


def test_it_goes_with_dapo_and_with_verl() -> None:
    config = validate({**BASE, "algorithm": {"name": "dapo", **ON}})
    assert config.algorithm.zero_signal == "refill"
    again = validate({**BASE, "algorithm": config.algorithm.model_dump(mode="json")}).algorithm
    assert again == config.algorithm
    validate({**BASE, "algorithm": ON, "learner": {"backend": "verl"}})
