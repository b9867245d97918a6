"""Advantage and policy-loss functions by name: ours, and those that a user registers.

    @agl.advantage("median")
    def median(inputs: AdvantageInputs, config: AlgorithmConfig) -> npt.NDArray: ...      # float64 [M]

    @agl.policy_loss("squared")
    def squared(inputs: LossInputs, config: AlgorithmConfig) -> Gain: ...

Then `algorithm: {imports: [path/file.py], advantage: median}`; or `algorithm.advantage: path/file.py:median`, which needs no
decorator. Each says which switches of `algorithm` it reads (`reads`), so that one that neither of a run's two functions reads is refused
(`refuse_unread`). Called by `agl_ray.algorithms.algorithm`. Test it alone: tests/unit/test_algorithms_switches.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy.typing as npt

from agl_ray.algorithms.base import (
    AdvantageInputs,
    CriticAdvantages,
    Episodes,
    Gain,
    LossInputs,
    Tokens,
)
from agl_ray.config.algorithm import PRESETS, AlgorithmConfig
from agl_ray.config.imports import load_object
from agl_ray.types import ConfigError

if TYPE_CHECKING:
    import torch

AdvantageFunction = Callable[[AdvantageInputs, AlgorithmConfig], npt.NDArray]
CriticAdvantage = Callable[[Episodes, npt.NDArray, AlgorithmConfig], CriticAdvantages]
PolicyLoss = Callable[[LossInputs, AlgorithmConfig], Gain]
Choice = Callable[[Tokens, AlgorithmConfig], "torch.Tensor"]
F = TypeVar("F", bound=Callable[..., Any])

OURS = (
    "grpo",
    "rloo",
    "maxrl",
    "opo",
    "rae",
    "gigpo",
    "gae",
    "clip_cov",
    "kl_cov",
    "gspo",
    "gmpo",
    "cispo",
    "sapo",
    "dppo",
    "topr",
    "opd",
)
"""Modules of this package that register functions."""

OTHER_BASELINES: set[str] = set()
"""Advantages whose baseline is not the group's: a group of equal rewards may have some."""

CRITIC_BASELINES: set[str] = set()
"""Advantages whose baseline are a critic's values: made by the learner, of tokens."""

_advantages: dict[str, Any] = {}
_losses: dict[str, PolicyLoss] = {}
_choices: dict[str, Choice] = {}
_zero_without_advantage: set[Callable[..., Any]] = set()
"""Policy losses that say that a token of advantage 0 adds nothing to them."""
_reads: dict[Callable[..., Any], frozenset[str]] = {}
"""Of each function that says so: the switches that it reads."""


def advantage(
    name: str, *, baseline: str = "group", reads: Iterable[str] | None = None
) -> Callable[[F], F]:
    """Register a function as advantage `name`; ConfigError where the name is taken by another function, or `reads` names no switch.

    reads: the keys of `algorithm` that the function reads (`config.rae_decay`: "rae_decay"); a run that sets another one in vain is refused.
    None: it may read any, and none is refused.
    baseline: `group`, where equal rewards of a group mean that nothing is to be learnt from it (its advantages are then exactly 0), `other`, or
    `critic`: the function is called as `function(episodes: Episodes, values, config)` and returns CriticAdvantages.
    """
    if baseline not in ("group", "other", "critic"):
        raise ConfigError(
            f"advantage {name!r}: baseline: expected group, other or critic, got {baseline!r}"
        )
    if baseline != "group":
        OTHER_BASELINES.add(name)
    if baseline == "critic":
        CRITIC_BASELINES.add(name)
    return _register(_advantages, name, "advantage", reads)


def policy_loss(
    name: str,
    *,
    choose: Choice | None = None,
    reads: Iterable[str] | None = None,
    zero_without_advantage: bool = False,
) -> Callable[[F], F]:
    """Register a function as policy loss `name`; ConfigError where the name is taken by another function, or `reads` names no switch.

    reads: as of `advantage`; those that `choose` reads are among them.
    choose: called before each update with all of its tokens, it returns which of them [K] the loss finds marked in `LossInputs.chosen`. It
    costs a forward pass.
    zero_without_advantage: the gain of a token of advantage 0 is 0 and so is its gradient, so that rows without any other token need not be run.
    """
    register: Callable[[F], F] = _register(_losses, name, "policy loss", reads)

    def keep(function: F) -> F:
        if zero_without_advantage:
            _zero_without_advantage.add(function)
        return register(function)

    if choose is not None:
        _choices[name] = choose
    return keep


def find_advantage(
    name: str, base: Path | None = None
) -> tuple[AdvantageFunction | None, CriticAdvantage | None]:
    """The advantage function of this name or `file.py:function`, in the second place where a critic is its baseline; ConfigError lists
    what there is."""
    found = _find(_advantages, name, "algorithm.advantage", base)
    return (None, found) if name in CRITIC_BASELINES else (found, None)


def find_policy_loss(name: str, base: Path | None = None) -> PolicyLoss:
    """As `find_advantage`, for `algorithm.loss`."""
    return _find(_losses, name, "algorithm.loss", base)


def find_choice(name: str) -> Choice | None:
    """The `choose` of this policy loss; None for one without. After `find_policy_loss`."""
    return _choices.get(name)


def acts_by_advantage(name: str, function: PolicyLoss) -> bool:
    """Whether rows without an advantage need not be run for this policy loss: it is one of ours or says so, and chooses among no tokens."""
    return name not in _choices and (_is_ours(function) or function in _zero_without_advantage)


def refuse_unread(config: AlgorithmConfig, chosen: Iterable[Callable[..., Any]]) -> None:
    """ConfigError for a switch with a value of its own that none of the `chosen` functions of a run reads."""
    reading = [_reads.get(function) for function in chosen]
    if None in reading:
        return
    read = frozenset[str]().union(*filter(None, reading))
    for switch, readers in switches().items():
        value = getattr(config, switch)
        default = AlgorithmConfig.model_fields[switch].default
        if value == default or switch in read:
            continue
        mend = "leave it out"
        if PRESETS[config.name].get(switch) == value:
            mend = f"it comes with algorithm.name {config.name}: choose another name, or say {switch}: {default}"
        raise ConfigError(
            f"algorithm.{switch} {value} would do nothing: it acts with {', '.join(readers)} only, and algorithm.loss is {config.loss}, "
            f"algorithm.advantage {config.advantage}; {mend}"
        )


def switches() -> dict[str, list[str]]:
    """Every switch that one of our functions reads, with those that do, as `loss clip`."""
    _import_ours()
    found: dict[str, list[str]] = {}
    for what, table in (("advantage", _advantages), ("loss", _losses)):
        for name, function in table.items():
            if _is_ours(function):
                for switch in sorted(_reads[function]):
                    found.setdefault(switch, []).append(f"{what} {name}")
    return found


def _register(
    table: dict[str, Any], name: str, what: str, reads: Iterable[str] | None
) -> Callable[[F], F]:
    unknown = sorted(set(reads or ()) - AlgorithmConfig.model_fields.keys())
    if unknown:
        raise ConfigError(f"{what} {name!r}: reads: expected keys of algorithm, got {unknown[0]!r}")

    def keep(function: F) -> F:
        known = table.get(name)
        if known is not None and known.__qualname__ != function.__qualname__:
            raise ConfigError(f"{what} {name!r} is registered already, by {known.__module__}")
        table[name] = function
        if reads is not None:
            _reads[function] = frozenset(reads)
        return function

    return keep


def _is_ours(function: Callable[..., Any]) -> bool:
    return function.__module__.startswith(f"{__package__}.")


def _import_ours() -> None:
    for module in OURS:
        importlib.import_module(f"agl_ray.algorithms.{module}")


def _find(table: dict[str, Any], name: str, key: str, base: Path | None) -> Any:
    _import_ours()
    if name in table:
        return table[name]
    if ":" in name:
        return load_object(name, base or Path.cwd())
    raise ConfigError(f"{key}: expected one of {sorted(table)} or file.py:function, got {name!r}")
