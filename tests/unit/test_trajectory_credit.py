"""Credit against a transcription in plain Python, span by span; what is refused; what is left out; what the learner gets."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learner_data import call, table

import agl_ray as agl
from agl_ray.algorithms.algorithm import make_algorithm
from agl_ray.config.algorithm import AlgorithmConfig
from agl_ray.config.credit import CreditConfig
from agl_ray.config.load import validate
from agl_ray.config.models import LearnerConfig
from agl_ray.config.trajectory import TrajectoryConfig
from agl_ray.learner.prepare import lay_out
from agl_ray.tracing.names import make_link_attributes, make_tag_attributes
from agl_ray.tracing.recorder import SpanRecorder, recording
from agl_ray.trajectory.batch import GroupPlan, Member, TrainBatch
from agl_ray.trajectory.calls import read_calls
from agl_ray.trajectory.credit import Credit, Unit, Units
from agl_ray.types import ConfigError, InputError, RunError

Spans = list[dict[str, Any]]
DIMENSIONS = ("primary", "format", "speed")


def reward(
    name: str,
    value: float,
    attempt: tuple[str, str],
    target: str | None = None,
    dimension: str = "primary",
    **further: float,
) -> dict[str, Any]:
    row = call(name, [], [], attempt=attempt, prompt_tokens=None)
    attributes: dict[str, Any] = {"agentlightning.reward.0.name": dimension}
    for number, (other, amount) in enumerate(further.items(), 1):
        attributes[f"agentlightning.reward.{number}.name"] = other
        attributes[f"agentlightning.reward.{number}.value"] = amount
    columns = {"reward": value, "reward_dimension": dimension, "reward_target": target}
    return {**row, "kind": "reward", "attributes": attributes, **columns}


def tagged(*tags: str) -> dict[str, Any]:
    return {"request": {"messages": [], "metadata": {**make_tag_attributes(tags), "user": "u"}}}


def random_spans(seed: int) -> tuple[Spans, TrainBatch]:
    """3 rows of up to 4 rollouts with up to 5 calls of roles None, a, b (some failed, frozen, tagged), and rewards for all kinds of parts."""
    rng = np.random.default_rng(seed)
    spans: Spans = []
    plans = []
    for group in range(3):
        members = []
        for rollout in range(int(rng.integers(1, 5))):
            attempt = (f"ro-{group}-{rollout}", f"at-{group}-{rollout}")
            outcome = float(rng.integers(0, 4)) / 3
            members.append(Member(rollout_id=attempt[0], attempt_id=attempt[1], reward=outcome))
            spans += _calls(rng, attempt)
            spans.append(reward("r", outcome, attempt, speed=float(rng.random())))
            spans.append(reward("f", float(rng.random()), attempt, dimension="format"))
            targets = ["c0", "c3", "turn:2", "tag:x", "role:a", "role:b", "no-such-call"]
            for number in range(int(rng.integers(0, 6))):
                target, dimension = str(rng.choice(targets)), str(rng.choice(DIMENSIONS))
                value = float(rng.normal())
                more = {"more": float(rng.normal())} if rng.random() < 0.5 else {}
                spans.append(reward(f"p{number}", value, attempt, target, dimension, **more))
        plans.append(GroupPlan(group_id=f"g{group}", members=tuple(members)))
    return spans, TrainBatch(step=1, groups=tuple(plans))


def _calls(rng: np.random.Generator, attempt: tuple[str, str]) -> Spans:
    made = []
    for number in range(int(rng.integers(0, 6))):
        role = [None, "a", "b"][int(rng.integers(0, 3))]
        attributes = tagged("x") if rng.random() < 0.4 else tagged()
        if rng.random() < 0.1:
            attributes["agl.role_kind"] = "frozen"
        status = "ERROR" if rng.random() < 0.1 else "OK"
        prompt, response = rng.integers(0, 3, 2).tolist(), rng.integers(0, 9, 3).tolist()
        logprobs = rng.normal(size=3).astype(np.float32).tolist()
        made.append(
            call(
                f"c{number}", prompt, response, attempt=attempt, role=role, status=status,
                attributes=attributes, logprobs=logprobs,
            )
        )  # fmt: skip
    return made


Key = tuple[str, Any]


def by_hand(
    spans: Spans, batch: TrainBatch, config: CreditConfig
) -> tuple[dict[Key, float], dict[tuple[str, str], Key]]:
    """Reward of each unit, by (rollout id, what in it); the unit of each call, by (rollout id, span id)."""
    rewards: defaultdict[Key, float] = defaultdict(float)
    unit_of: dict[tuple[str, str], Key] = {}
    for member in batch.members:
        mine = [span for span in spans if span["rollout_id"] == member.rollout_id]
        calls = [span for span in mine if span["kind"] == "call"]
        units: dict[str, Key] = {}
        for made in calls:
            what = {"rollout": None, "call": made["span_id"], "role": made["role"]}[config.unit]
            gone = made["status"] == "ERROR" or "agl.role_kind" in made["attributes"]
            if config.unit == "rollout" or not gone:
                units[made["span_id"]] = (member.rollout_id, what)
        every = {(member.rollout_id, None)} if config.unit == "rollout" else set(units.values())
        unit_of |= {(member.rollout_id, span_id): unit for span_id, unit in units.items()}
        own: dict[str, float] = {}
        parts: list[tuple[str, str, float]] = []
        for span in mine:
            if span["kind"] != "reward":
                continue
            given = {span["reward_dimension"]: span["reward"]}
            for key, value in span["attributes"].items():
                if key.endswith(".value"):
                    given[span["attributes"][key.replace(".value", ".name")]] = value
            if span["reward_target"] is None:
                own |= given
            else:
                parts += [(span["reward_target"], name, value) for name, value in given.items()]
        weights = config.weights
        outcome = (
            sum(weights[name] * own.get(name, 0.0) for name in weights)
            if weights
            else member.reward
        )
        for unit in every:
            rewards[unit] += outcome if config.outcome == "broadcast" else 0.0
        if config.outcome == "last" and units:
            rewards[units[[c["span_id"] for c in calls if c["span_id"] in units][-1]]] += outcome
        for target, name, value in parts:
            weight = weights.get(name, 0.0) if weights else float(name != "more")
            hit = {
                units[c["span_id"]]
                for i, c in enumerate(calls)
                if c["span_id"] in units and named(c, i, target)
            }
            for unit in hit:
                rewards[unit] += weight * value
    return dict(rewards), unit_of


def named(made: dict[str, Any], index: int, target: str) -> bool:
    if target.startswith("role:"):
        return bool(made["role"] == target[5:])
    if target.startswith("tag:"):
        return target[4:] in made["attributes"]["request"]["metadata"].values()
    return target in (made["span_id"], f"turn:{index + 1}")


def units_of(
    spans: Spans, batch: TrainBatch, config: CreditConfig, base: Path | None = None
) -> Units:
    whole = table(spans)
    return Credit(config, base).units(read_calls(whole, batch.attempts), whole, batch)


CASES = [
    {},
    {"weights": {"primary": 1.0, "format": 0.5, "speed": -0.25}},
    {"outcome": "none"},
    {"unit": "call"},
    {"unit": "call", "outcome": "last", "group": "row+role"},
    {"unit": "call", "weights": {"format": 2.0, "more": -1.0}},
    {"unit": "role", "group": "row+role"},
    {"unit": "role", "outcome": "none", "weights": {"speed": 1.0, "primary": 3.0}},
    {"unit": "role", "outcome": "last"},
]


@pytest.mark.parametrize("given", CASES, ids=str)
def test_rewards_of_units(given: dict[str, Any]) -> None:
    config = CreditConfig.model_validate(given)
    for seed in range(12):
        spans, batch = random_spans(seed)
        expected, unit_of = by_hand(spans, batch, config)
        units = units_of(spans, batch, config)
        calls = [span for span in spans if span["kind"] == "call"]
        assert len(units.reward) == len(expected)
        for made, unit in zip(calls, units.of_call.tolist(), strict=True):
            key = unit_of.get((made["rollout_id"], made["span_id"]))
            assert (unit < 0) == (key is None)
            if key is not None:
                assert units.reward[unit] == pytest.approx(expected[key], abs=1e-9)
        if config.unit == "rollout":
            mine = [expected[member.rollout_id, None] for member in batch.members]
            np.testing.assert_allclose(units.reward, mine, rtol=0, atol=1e-9)
        owners = [batch.members[member].rollout_id for member in units.member]
        rows = [owner.split("-")[1] for owner in owners]
        keys = list(zip(rows, units.role, strict=True)) if "role" in config.group else rows
        assert partition(units.group) == partition(keys)


def partition(keys: Sequence[Any]) -> list[list[int]]:
    keys = list(keys)
    return [[i for i, other in enumerate(keys) if other == key] for key in dict.fromkeys(keys)]


@pytest.mark.parametrize("rows", ["merge-prefix", "per-call"])
@pytest.mark.parametrize("unit", ["rollout", "call", "role"])
def test_every_token_has_the_advantage_of_its_unit(unit: str, rows: str) -> None:
    config = CreditConfig.model_validate({"unit": unit})
    for seed in range(8):
        spans, batch = random_spans(seed)
        expected, unit_of = by_hand(spans, batch, config)
        groups: defaultdict[str, list[float]] = defaultdict(list)
        for (rollout, _), value in expected.items():
            groups[rollout.split("-")[1]].append(value)
        baseline = {name: math.fsum(values) / len(values) for name, values in groups.items()}
        advantage = {key: value - baseline[key[0].split("-")[1]] for key, value in expected.items()}
        (payload,) = lay_out(
            table(spans), batch, make_algorithm(AlgorithmConfig()), LearnerConfig(), world_size=1, seed=0,
            trajectory=TrajectoryConfig.model_validate({"rows": rows}), credit=Credit(config),
        )  # fmt: skip
        by_token = {}  # random log-probabilities tell the tokens apart
        for made in (span for span in spans if span["kind"] == "call"):
            key = unit_of.get((made["rollout_id"], made["span_id"]))
            gone = made["status"] == "ERROR" or "agl.role_kind" in made["attributes"]
            if key is not None and not gone:
                by_token |= dict.fromkeys(made["response_logprobs"], advantage[key])
        got = {}
        for micro in payload.updates[0].micros if payload.updates else ():
            here = micro.weights > 0
            names = micro.columns["engine_logprobs"][here].tolist()
            got |= dict(zip(names, micro.columns["advantages"][here].tolist(), strict=True))
        assert got.keys() <= by_token.keys()
        for token, value in by_token.items():
            assert got.get(token, 0.0) == pytest.approx(value, abs=1e-6)


ONE, TWO = ("ro-1", "at-1"), ("ro-2", "at-2")


def two_rollouts(first: float = 1.0, second: float = 0.0) -> TrainBatch:
    members = (
        Member(rollout_id="ro-1", attempt_id="at-1", reward=first),
        Member(rollout_id="ro-2", attempt_id="at-2", reward=second),
    )
    return TrainBatch(step=1, groups=(GroupPlan(group_id="g", members=members),))


def test_the_defaults_broadcast_the_outcome_to_every_turn() -> None:
    spans = [
        call("a", [1], [2], attempt=ONE),
        call("b", [3], [4], attempt=ONE, parent="a", shared=2),
        call("a", [1], [5], attempt=TWO),
    ]
    units = units_of(spans, two_rollouts(), CreditConfig())
    assert units.of_call.tolist() == [0, 0, 1]
    assert (units.reward.tolist(), units.group.tolist()) == ([1.0, 0.0], [0, 0])


def test_a_users_function_makes_the_groups(tmp_path: Path) -> None:
    (tmp_path / "groups.py").write_text(
        "def faction(unit):\n    return unit.group_id + ('wolves' if unit.role == 'a' else 'village')\n\n"
        "def nothing(unit):\n    return unit.turn\n"
    )
    spans = [
        call(f"{role}{number}", [1], [2], attempt=attempt, role=role)
        for attempt in (ONE, TWO)
        for number, role in enumerate("abc")
    ]
    config = CreditConfig(unit="call", group="groups.py:faction")
    units = units_of(spans, two_rollouts(), config, tmp_path)
    assert units.group.tolist() == [0, 1, 1, 0, 1, 1]
    with pytest.raises(InputError, match=r"groups.py:nothing: expected a text.*got 1"):
        units_of(
            spans, two_rollouts(), CreditConfig(unit="call", group="groups.py:nothing"), tmp_path
        )
    with pytest.raises(InputError, match=r"groups.py has no 'other'"):
        Credit(CreditConfig(group="groups.py:other"), tmp_path)


def test_a_function_sees_the_unit(tmp_path: Path) -> None:
    (tmp_path / "looks.py").write_text(
        "seen = []\ndef look(unit):\n    seen.append(unit)\n    return ''\n"
    )
    spans = [call("a", [1], [2], attempt=ONE, role="r", attributes=tagged("x", "y"))]
    config = CreditConfig(unit="call", group="looks.py:look")
    credit = Credit(config, tmp_path)
    whole = table(spans)
    credit.units(read_calls(whole, two_rollouts().attempts), whole, two_rollouts())
    seen = credit._key.__globals__["seen"]  # type: ignore[union-attr]
    assert seen == [Unit("g", "ro-1", "at-1", "r", 1, ("x", "y"))]


def test_a_rollout_that_lacks_a_dimension_is_left_out_and_its_tokens_are_counted() -> None:
    spans = [
        call("a", [1], [2, 3], attempt=ONE),
        call("a", [1], [4], attempt=TWO),
        reward("f", 0.5, ONE, dimension="format"),
    ]
    config = CreditConfig(weights={"primary": 1.0, "format": 1.0})
    units = units_of(spans, two_rollouts(), config)
    assert (units.reward.tolist(), units.member.tolist()) == ([1.5], [0])
    assert units.counts["rollouts_without_reward"] == 1
    assert units.counts["reward_of.format"] == 0.5
    (payload,) = lay_out(
        table(spans), two_rollouts(), make_algorithm(AlgorithmConfig(advantage="reward")), LearnerConfig(),
        world_size=1, seed=0, credit=Credit(config),
    )  # fmt: skip
    assert payload.stats["tokens_dropped_unrewarded"] == 1
    assert payload.stats["tokens_of_batch"] == 2
    (micro,) = payload.updates[0].micros
    assert micro.columns["advantages"].tolist() == [0, 1.5, 1.5]


def test_dimensions_of_parts_need_not_be_in_every_rollout() -> None:
    spans = [
        call("a", [1], [2], attempt=ONE),
        call("a", [1], [4], attempt=TWO),
        reward("f", -1.0, TWO, "a", dimension="format"),
    ]
    config = CreditConfig(weights={"primary": 1.0, "format": 0.5})
    assert units_of(spans, two_rollouts(), config).reward.tolist() == [1.0, -0.5]


@pytest.mark.parametrize("target", [None, "a"])
def test_a_reward_that_is_no_number_is_named(target: str | None) -> None:
    spans = [call("a", [1], [2], attempt=ONE), reward("r", math.nan, ONE, target)]
    with pytest.raises(RunError, match="attempt at-1 of rollout ro-1: expected rewards that are"):
        units_of(spans, two_rollouts(), CreditConfig())


def test_weights_that_no_reward_has_are_an_error() -> None:
    spans = [call("a", [1], [2], attempt=ONE)]
    with pytest.raises(RunError, match=r"credit.weights: expected .*\['speling'\].*\['primary'\]"):
        units_of(spans, two_rollouts(), CreditConfig(weights={"speling": 1.0}))


def test_what_calls_of_frozen_roles_and_of_models_outside_are() -> None:
    outside = {"agl.role_kind": "endpoint", "agl.token_ids": "none"}
    spans = [
        call("a", [1], [2], attempt=ONE, role="a"),
        call("b", [3], [4], attempt=ONE, role="b", attributes={"agl.role_kind": "frozen"}),
        call("c", [], [], attempt=ONE, role="c", attributes=outside, prompt_tokens=17),
        call("a", [1], [5], attempt=TWO, role="a"),
    ]
    (payload,) = lay_out(
        table(spans), two_rollouts(), make_algorithm(AlgorithmConfig()), LearnerConfig(), world_size=1, seed=0,
        credit=Credit(CreditConfig(unit="role", group="row+role")),
    )  # fmt: skip
    stats = payload.stats
    assert (stats["units"], stats["unit_groups"]) == (2, 1)
    assert (stats["calls_frozen"], stats["tokens_dropped_frozen"]) == (2, 1)
    assert stats["tokens_made"] == stats["tokens_of_batch"] + 1 == 3


def test_groups_without_signal_are_counted_by_row_and_by_unit() -> None:
    spans = [
        call(name, [1], [2, 3], attempt=attempt, role=role)
        for attempt in (ONE, TWO)
        for name, role in (("a", "x"), ("b", "y"))
    ]
    spans.append(reward("r", 1.0, TWO, "role:x"))
    (payload,) = lay_out(
        table(spans), two_rollouts(0.5, 0.5), make_algorithm(AlgorithmConfig()), LearnerConfig(),
        world_size=1, seed=0, credit=Credit(CreditConfig(unit="role", group="row+role")),
    )  # fmt: skip
    stats = payload.stats
    assert (stats["groups"], stats["zero_signal_groups"]) == (1, 0)
    assert (stats["unit_groups"], stats["zero_signal_unit_groups"]) == (2, 1)
    assert stats["rows"] == 2  # those of role y have nothing to learn from
    assert (stats["reward_role.x"], stats["reward_role.y"]) == (1.0, 0.5)
    spread = (stats["advantage_mean"], stats["advantage_std"], stats["advantage_max"])
    assert spread == pytest.approx((0.0, math.sqrt(0.125), 0.5))


def test_rewards_are_shown_by_role_and_by_tag() -> None:
    spans = [
        call("a", [1], [2], attempt=ONE, role="x", attributes=tagged("find")),
        call("b", [1], [2], attempt=ONE, role="x", attributes=tagged("find", "last")),
        call("a", [1], [2], attempt=TWO, attributes=tagged("find")),
    ]
    counts = units_of(spans, two_rollouts(1.0, 0.5), CreditConfig()).counts
    shown = {name: value for name, value in counts.items() if name.startswith("reward_")}
    # A rollout counts once, however many of its calls have the tag; nobody asked for a line of calls without a role.
    assert shown == {"reward_role.x": 1.0, "reward_tag.find": 0.75, "reward_tag.last": 1.0}
    by_call = units_of(spans, two_rollouts(1.0, 0.5), CreditConfig(unit="call")).counts
    assert by_call["reward_role.none"] == 0.5
    assert by_call["reward_tag.find"] == pytest.approx(2.5 / 3)


def test_what_agents_emit_reaches_the_units() -> None:
    recorder = SpanRecorder(*ONE)
    with recording(recorder):
        agl.emit_reward({"right": 1.0, "short": 0.25}, primary_key="right")
        agl.emit_reward(10.0, call_id="chatcmpl-a")
        agl.emit_reward(20.0, tag="search")
        agl.emit_reward(40.0, attributes=make_link_attributes({"agl.role": "wolf"}))
        agl.emit_reward(80.0, attributes=make_link_attributes({"agl.turn": "2"}))
        agl.emit_reward({"right": 0.0, "short": 160.0}, primary_key="right", tag="search")
    spans = [
        call("a", [1], [2], attempt=ONE, role="wolf"),
        call("b", [1], [2], attempt=ONE, attributes=tagged("search")),
        call("c", [1], [2], attempt=ONE, attributes=tagged("plan", "search"), role="wolf"),
        *recorder.take(),
    ]
    members = (Member(rollout_id="ro-1", attempt_id="at-1", reward=1.0),)
    batch = TrainBatch(step=1, groups=(GroupPlan(group_id="g", members=members),))
    units = units_of(spans, batch, CreditConfig(unit="call"))
    assert units.reward.tolist() == [1 + 10 + 40, 1 + 20 + 80, 1 + 20 + 40]
    weights = {"right": 2.0, "short": 4.0}
    units = units_of(spans, batch, CreditConfig(unit="call", weights=weights))
    assert units.reward.tolist() == [3.0, 3 + 4 * 160, 3 + 4 * 160]
    assert units_of(spans, batch, CreditConfig()).reward.tolist() == [1 + 10 + 20 + 40 + 80]


SIDES = {"wolves": ["wolf", "king"], "village": ["seer"]}


def faction(**sides: list[str]) -> dict[str, Any]:
    return {"unit": "role", "group": "row+faction", "factions": sides}


@pytest.mark.parametrize("unit", ["call", "role"])
def test_the_units_of_a_side_are_compared(unit: Any) -> None:
    """A game that the wolves win in one rollout and lose in the other: among all units the outcome tells the sides apart, within a side how well it did."""
    spans: Spans = []
    plans = []
    for row in (0, 1):
        members = []
        for game, won in enumerate((1.0, 0.0)):
            attempt = (f"ro-{row}-{game}", "at-1")
            for role in ("wolf", "king", "seer"):
                spans.append(call(role, [1], [2], attempt=attempt, role=role))
                spans.append(call(f"{role}2", [1], [2], attempt=attempt, role=role))
                paid = won if role != "seer" else 1 - won
                spans.append(reward(f"r-{role}", paid, attempt, f"role:{role}"))
            members.append(Member(rollout_id=attempt[0], attempt_id="at-1", reward=0.0))
        plans.append(GroupPlan(group_id=f"g{row}", members=tuple(members)))
    batch = TrainBatch(step=1, groups=tuple(plans))
    config = CreditConfig(unit=unit, group="row+faction", factions=SIDES)
    units = units_of(spans, batch, config)
    sides = ["village" if role == "seer" else "wolves" for role in units.role]
    keys = list(zip(units.row.tolist(), sides, strict=True))
    assert partition(units.group.tolist()) == partition(keys)
    assert units.counts["unit_groups"] == 4
    made = make_algorithm(AlgorithmConfig()).advantages(units.reward, units.group)
    assert made.tolist() == [0.5 if each else -0.5 for each in units.reward]


@pytest.mark.parametrize("role", [None, "hunter"])
def test_a_role_of_no_side_ends_the_run(role: str | None) -> None:
    spans = [
        call("a", [1], [2], attempt=ONE, role="wolf"),
        call("x", [1], [2], attempt=ONE, role="judge", attributes={"agl.role_kind": "frozen"}),
    ]
    batch = two_rollouts()
    batch = TrainBatch(step=1, groups=(GroupPlan(group_id="g", members=batch.members[:1]),))
    config = CreditConfig(unit="call", group="row+faction", factions=SIDES)
    assert len(units_of(spans, batch, config).reward) == 1  # what is not trained needs none
    spans.append(call("b", [1], [2], attempt=ONE, role=role))
    words = r"roles king, seer, wolf, got one of (no role|role 'hunter') in rollout ro-1; put"
    with pytest.raises(RunError, match=words):
        units_of(spans, batch, config)


@pytest.mark.parametrize(
    ("roles", "words"),
    [
        ({"wolf": "train", "king": "train"}, r"section roles \(king, wolf\), got 'seer'"),
        ({"wolf": "frozen", "king": "frozen", "seer": "frozen"}, "expected a role of kind train"),
        (
            {"wolf": "train", "king": "frozen", "seer": "train", "fox": "train"},
            "every trained role on a side, got none for 'fox'",
        ),
    ],
)
def test_sides_and_roles_fit_together(roles: dict[str, Any], words: str) -> None:
    base = {"model": {"path": "m"}, "credit": faction(**SIDES)}
    right = {"wolf": "train", "king": "frozen", "seer": "frozen", "judge": "frozen"}
    assert validate({**base, "roles": right}).credit.faction_of["king"] == "wolves"
    with pytest.raises(ConfigError, match=words):
        validate({**base, "roles": roles})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"group": "raw"},
            "credit.group: expected row, row\\+role, row\\+faction or file.py:function, got 'raw'",
        ),
        ({"group": "row+role"}, "row\\+role needs credit.unit call or role"),
        (
            {"group": "row+faction", "factions": SIDES},
            "row\\+faction needs credit.unit call or role",
        ),
        ({"unit": "role", "group": "row+faction"}, "act together only; .* 0 factions"),
        ({"unit": "role", "factions": SIDES}, "act together only; got credit.group 'row'"),
        (faction(one=["a"], two=["b", "a"]), "every role once, got 'a' 2 times"),
        (faction(one=["a"], two=[]), "credit.factions.two"),
        (faction(one=["a"], two=["b"]), "roles of the section roles .it has none., got 'a'"),
        ({"outcome": "last"}, "credit.outcome last acts with credit.unit call or role only"),
        ({"weights": {"primary": 0.0}}, "expected a weight other than 0"),
        ({"unit": "turn"}, "credit.unit"),
    ],
)
def test_what_would_do_nothing_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate({"model": {"path": "m"}, "credit": given})
