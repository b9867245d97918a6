"""GiGPO against a transcription of the paper in plain Python, and from call spans to the tokens' advantages."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from learner_data import call, table

from agl_ray.algorithms.algorithm import make_algorithm
from agl_ray.algorithms.base import AdvantageInputs
from agl_ray.config.algorithm import AlgorithmConfig
from agl_ray.config.credit import CreditConfig
from agl_ray.config.load import validate
from agl_ray.config.models import LearnerConfig
from agl_ray.learner.prepare import lay_out
from agl_ray.trajectory.batch import GroupPlan, Member, TrainBatch
from agl_ray.trajectory.credit import Credit
from agl_ray.types import ConfigError

CONFIG = AlgorithmConfig(advantage="gigpo", gigpo_gamma=0.9, gigpo_weight=0.7)


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def by_hand(steps: list[tuple[int, int, int, int, float]]) -> list[float]:
    """steps: (group, rollout, turn, state, reward). The formulas, one step at a time."""
    out = []
    for group, rollout, turn, state, _ in steps:
        peers = [s for s in steps if s[0] == group]
        episodes = [
            math.fsum(s[4] for s in peers if s[1] == one)
            for one in dict.fromkeys(s[1] for s in peers)
        ]
        mine = math.fsum(s[4] for s in peers if s[1] == rollout)
        there = [to_go(peers, s) for s in peers if s[3] == state]
        own = to_go(peers, (group, rollout, turn, state, 0.0))
        out.append(mine - mean(episodes) + 0.7 * (own - mean(there)))
    return out


def to_go(
    steps: list[tuple[int, int, int, int, float]], at: tuple[int, int, int, int, float]
) -> float:
    later = sorted((s[2], s[4]) for s in steps if s[1] == at[1] and s[2] >= at[2])
    return math.fsum(0.9**k * value for k, (_, value) in enumerate(later))


@pytest.mark.parametrize("seed", range(5))
def test_against_the_paper(seed: int) -> None:
    rng = np.random.default_rng(seed)
    steps = [
        (rollout // 5, rollout, turn, int(rng.integers(0, 3)), float(rng.normal()))
        for rollout in range(20)
        for turn in range(1, int(rng.integers(2, 7)))
    ]
    steps = [steps[i] for i in rng.permutation(len(steps))]
    group, rollout, turn, state, reward = (np.array(column) for column in zip(*steps, strict=True))
    got = make_algorithm(CONFIG).advantages_of(
        AdvantageInputs(reward, group, turn, rollout, [None] * len(steps), turn, state, {})
    )
    np.testing.assert_allclose(got, by_hand(steps), rtol=0, atol=1e-9)


def test_from_spans_to_tokens_equal_observations_are_equal_states() -> None:
    spans: list[dict[str, Any]] = []
    members = []
    for number, (seen, outcome) in enumerate([(7, 1.0), (7, 0.0), (8, 0.5)]):
        attempt = (f"ro-{number}", f"at-{number}")
        spans.append(call("a", [1, 2], [3], attempt=attempt, logprobs=[-1.0 - number]))
        spans.append(
            call("b", [seen], [4], attempt=attempt, parent="a", shared=3, logprobs=[-5.0 - number])
        )
        members.append(Member(rollout_id=attempt[0], attempt_id=attempt[1], reward=outcome))
    batch = TrainBatch(step=1, groups=(GroupPlan(group_id="g", members=tuple(members)),))
    (payload,) = lay_out(
        table(spans), batch, make_algorithm(CONFIG), LearnerConfig(), world_size=1, seed=0,
        credit=Credit(CreditConfig(unit="call", outcome="last")),
    )  # fmt: skip
    (micro,) = payload.updates[0].micros
    here = micro.weights > 0
    got = dict(
        zip(micro.columns["engine_logprobs"][here], micro.columns["advantages"][here], strict=True)
    )
    whole = [0.5, -0.5, 0.0]
    at_first = [0.9 * 0.5, -0.9 * 0.5, 0.0]  # all three began in the same state
    at_second = [0.5, -0.5, 0.0]  # the third was alone in its own
    for number in range(3):
        if number == 2:
            assert -3.0 not in got  # no advantage: not even run
            continue
        assert got[-1.0 - number] == pytest.approx(whole[number] + 0.7 * at_first[number], abs=1e-6)
        assert got[-5.0 - number] == pytest.approx(
            whole[number] + 0.7 * at_second[number], abs=1e-6
        )


def test_equal_rewards_give_exactly_nothing() -> None:
    third = np.full(6, 1 / 3)
    two, three = np.arange(6) // 2, np.arange(6) % 2 + 1
    got = make_algorithm(CONFIG).advantages_of(
        AdvantageInputs(third, np.zeros(6, np.int64), three, two, [None] * 6, three, three, {})
    )
    assert not got.any()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"algorithm": {"advantage": "gigpo"}}, "gigpo needs credit.unit call, got rollout"),
        (
            {"algorithm": {"advantage": "gigpo"}, "credit": {"unit": "call"}},
            "once for every call; say last or none",
        ),
        ({"algorithm": {"advantage": "gigpo", "normalize": "group"}}, "gigpo has two baselines"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate({"model": {"path": "m"}, **given})
