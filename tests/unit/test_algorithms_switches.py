"""Every switch of an advantage or loss function changes what comes out, or is refused: by walking the registry."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loss_streams import inputs_of, random_streams

import agl_ray as agl
from agl_ray.algorithms import registry
from agl_ray.algorithms.algorithm import Algorithm, make_algorithm
from agl_ray.algorithms.base import AdvantageInputs, Episodes, Gain, LossInputs, Tokens
from agl_ray.config.algorithm import _ACTS_WITH, _OVERLONG, AlgorithmConfig
from agl_ray.types import ConfigError

READERS = registry.switches()
LOSSES = sorted(name for name, f in registry._losses.items() if f.__module__.startswith("agl_ray."))
ADVANTAGES = sorted(
    name for name, f in registry._advantages.items() if f.__module__.startswith("agl_ray.")
)
# An advantage that takes nothing from the rewards needs something else to learn from.
BESIDE: dict[str, dict[str, Any]] = {"none": {"kl": {"coefficient": 1.0}}}
# Share 1: each token that is chosen tells on the loss.
START = {"cov_share": 1.0}
CHANGED: dict[str, float] = {
    "clip_low": 0.05,
    "clip_high": 0.05,
    "dual_clip": 1.1,
    "sapo_tau_positive": 2.0,
    "sapo_tau_negative": 2.0,
    "cov_share": 0.1,
    "cov_low": 0.5,
    "cov_high": 2.0,
    "kl_cov_coefficient": 0.5,
    "dppo_bound": 0.01,
    "rae_decay": 0.5,
    "gigpo_gamma": 0.5,
    "gigpo_weight": 0.5,
    "gae_gamma": 0.5,
    "gae_lambda": 0.5,
    "gae_return_lambda": 0.5,
}


def read_by(what: str, name: str) -> set[str]:
    return {switch for switch, readers in READERS.items() if f"{what} {name}" in readers}


def pairs(what: str, names: list[str], read: bool) -> list[tuple[str, str]]:
    """(function, switch) of all functions, and of their own switches or of the others."""
    return [(n, s) for n in names for s in sorted(READERS) if (s in read_by(what, n)) == read]


def inputs_with_choice(algorithm: Algorithm | None, choose: Any, config: Any) -> LossInputs:
    inputs = inputs_of(random_streams(5, rows=40))
    if choose is None:
        return inputs
    values = [getattr(inputs, n).detach() for n in ("logprobs", "old_logprobs", "advantages")]
    draws = torch.rand(len(values[0]), generator=torch.Generator().manual_seed(0))
    return replace(inputs, chosen=choose(Tokens(*values, draws), config))


def loss_of(config: AlgorithmConfig) -> float:
    algorithm = make_algorithm(config)
    inputs = inputs_with_choice(algorithm, registry.find_choice(config.loss), config)
    return algorithm.loss(inputs).loss.item()


def units() -> AdvantageInputs:
    """Two groups of two rollouts of three calls; the state of a call's turn is the same in all of a group."""
    rng = np.random.default_rng(0)
    return AdvantageInputs(
        rewards=rng.random(12),
        group=np.repeat([0, 1], 6),
        tokens=rng.integers(1, 9, 12),
        rollout=np.repeat(np.arange(4), 3),
        role=["planner", "solver"] * 6,
        turn=np.tile([1, 2, 3], 4),
        state=np.tile([0, 1, 2], 4) + np.repeat([0, 3], 6),
        kept={},
    )


def advantages_of(config: AlgorithmConfig) -> np.ndarray:
    algorithm = make_algorithm(config)
    if not algorithm.needs_critic:
        return algorithm.advantages_of(units())
    rng = np.random.default_rng(0)
    made = algorithm.critic_advantages(Episodes(rng.random(9), np.array([4, 5])), rng.random(9))
    return np.concatenate(made)


@pytest.mark.parametrize(("loss", "switch"), pairs("loss", LOSSES, True))
def test_a_switch_that_a_loss_declares_changes_the_loss(loss: str, switch: str) -> None:
    start = {"loss": loss, **{name: START[name] for name in START if name in read_by("loss", loss)}}
    before = loss_of(AlgorithmConfig.model_validate(start))
    after = loss_of(AlgorithmConfig.model_validate({**start, switch: CHANGED[switch]}))
    assert before != after


@pytest.mark.parametrize(("name", "switch"), pairs("advantage", ADVANTAGES, True))
def test_a_switch_that_an_advantage_declares_changes_it(name: str, switch: str) -> None:
    before = advantages_of(AlgorithmConfig(advantage=name))
    config = AlgorithmConfig.model_validate({"advantage": name, switch: CHANGED[switch]})
    assert not np.array_equal(before, advantages_of(config))


@pytest.mark.parametrize(
    ("what", "name", "switch"),
    [("loss", *pair) for pair in pairs("loss", LOSSES, False)]
    + [("advantage", *pair) for pair in pairs("advantage", ADVANTAGES, False)],
)
def test_a_switch_that_is_not_declared_is_refused(what: str, name: str, switch: str) -> None:
    given = {"advantage": "group", "loss": "topr", what: name, switch: CHANGED[switch]}
    given |= BESIDE.get(name, {})
    words = rf"algorithm\.{switch} .* would do nothing.*\.{what} (is )?{name}\b.*; leave it out"
    with pytest.raises(ConfigError, match=words):
        make_algorithm(AlgorithmConfig.model_validate(given))


class Watched:
    """A configuration that remembers which of its keys were asked for."""

    def __init__(self, config: AlgorithmConfig) -> None:
        self.config, self.asked = config, set[str]()

    def __getattr__(self, name: str) -> Any:
        self.asked.add(name)
        return getattr(self.config, name)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_reads_what_it_declares_and_nothing_else(loss: str) -> None:
    config: Any = Watched(AlgorithmConfig(loss=loss))
    inputs = inputs_with_choice(None, registry.find_choice(loss), config)
    registry.find_policy_loss(loss)(inputs, config)
    assert config.asked == read_by("loss", loss)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_an_advantage_reads_what_it_declares_and_nothing_else(name: str) -> None:
    given = {"advantage": name, **BESIDE.get(name, {})}
    config: Any = Watched(AlgorithmConfig.model_validate(given))
    of_units, of_critic = registry.find_advantage(name)
    if of_critic is None:
        assert of_units is not None
        of_units(units(), config)
    else:
        of_critic(Episodes(np.ones(3), np.array([3])), np.zeros(3), config)
    assert config.asked == read_by("advantage", name)


def test_every_switch_is_some_functions_or_acts_with_another() -> None:
    always = {
        "name", "imports", "advantage", "normalize", "zero_signal", "loss", "aggregation", "entropy_coefficient", "proximal", "correction", "kl",
        "teacher",
    }  # fmt: skip
    groups = always, set(_ACTS_WITH), set(READERS), set(_OVERLONG)
    unplaced = AlgorithmConfig.model_fields.keys() - set().union(*groups)
    assert not unplaced, (
        "which function reads it, with what does it act? (reads=, _ACTS_WITH; above: always)"
    )
    assert sum(map(len, groups)) == len(AlgorithmConfig.model_fields)
    assert CHANGED.keys() == READERS.keys()


def test_a_switch_that_comes_with_a_name_is_said_to() -> None:
    config = AlgorithmConfig.model_validate({"name": "gspo", "loss": "sapo"})
    with pytest.raises(
        ConfigError, match=r"it comes with algorithm\.name gspo: .* or say clip_high: 0\.28$"
    ):
        make_algorithm(config)


# --- a user's own ------------------------------------------------------------------------------


@agl.policy_loss("test_reads_any")
def reads_any(inputs: LossInputs, config: AlgorithmConfig) -> Gain:
    return Gain(inputs.logprobs * config.dppo_bound)


@agl.policy_loss("test_reads_one", reads=["dppo_bound"])
def reads_one(inputs: LossInputs, config: AlgorithmConfig) -> Gain:
    return Gain(inputs.logprobs * config.dppo_bound)


def test_a_users_loss_may_read_any_switch_unless_it_says_which() -> None:
    make_algorithm(AlgorithmConfig(loss="test_reads_any", dppo_bound=0.5, clip_low=0.1))
    make_algorithm(AlgorithmConfig(loss="test_reads_one", dppo_bound=0.5))
    with pytest.raises(
        ConfigError, match=r"algorithm\.clip_low 0\.1 would do nothing: it acts with"
    ):
        make_algorithm(AlgorithmConfig(loss="test_reads_one", clip_low=0.1))
    assert "loss test_reads_one" not in READERS["dppo_bound"]


@agl.policy_loss("test_by_advantage", zero_without_advantage=True)
def by_advantage(inputs: LossInputs, config: AlgorithmConfig) -> Gain:
    return Gain(inputs.logprobs * inputs.advantages)


def test_rows_without_an_advantage_are_skipped_where_the_loss_says_that_they_add_nothing(
    tmp_path: Path,
) -> None:
    for loss in LOSSES:
        made = make_algorithm(AlgorithmConfig(loss=loss))
        assert made.skip_zero_advantage == (registry.find_choice(loss) is None)
    assert make_algorithm(AlgorithmConfig(loss="test_by_advantage")).skip_zero_advantage
    assert not make_algorithm(AlgorithmConfig(loss="test_reads_any")).skip_zero_advantage
    (tmp_path / "plain.py").write_text("def own(inputs, config):\n    return None\n")
    plain = make_algorithm(AlgorithmConfig(loss="plain.py:own"), tmp_path)
    assert not plain.skip_zero_advantage


def test_what_a_file_names_counts_as_what_it_declares(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import agl_ray as agl\n\n@agl.advantage('test_own', reads=['rae_decay'])\ndef own(inputs, config):\n    return config.rae_decay * inputs.rewards\n"
    )
    make_algorithm(AlgorithmConfig(advantage="mine.py:own", rae_decay=0.5), tmp_path)
    with pytest.raises(ConfigError, match=r"gigpo_gamma 0\.5 would do nothing"):
        make_algorithm(AlgorithmConfig(advantage="mine.py:own", gigpo_gamma=0.5), tmp_path)


def test_reads_that_are_no_switch_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"reads: expected keys of algorithm, got 'clip_hi'"):
        agl.policy_loss("test_misspelt", reads=["clip_low", "clip_hi"])
