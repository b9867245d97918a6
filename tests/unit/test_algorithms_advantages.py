"""Every advantage against a transcription in float64, group by group; and what a user's own function must give."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import agl_ray as agl
from agl_ray.algorithms.algorithm import make_algorithm
from agl_ray.algorithms.base import AdvantageInputs
from agl_ray.config.algorithm import AlgorithmConfig
from agl_ray.types import ConfigError, InputError

Case = tuple[list[float], list[int], list[int]]


def batch(seed: int) -> Case:
    """Rewards >= 0, groups of 1 to about 12 rollouts in no order, tokens (some rollouts have none)."""
    rng = np.random.default_rng(seed)
    rewards = rng.random(80) * (rng.random(80) < 0.6)
    return rewards.tolist(), rng.integers(0, 9, 80).tolist(), rng.integers(0, 30, 80).tolist()


def group(rewards: list[float], tokens: list[int], i: int) -> float:
    return rewards[i] - math.fsum(rewards) / len(rewards)


def rloo(rewards: list[float], tokens: list[int], i: int) -> float:
    others = [r for j, r in enumerate(rewards) if j != i]
    return rewards[i] - math.fsum(others) / len(others) if others else 0.0


def maxrl(rewards: list[float], tokens: list[int], i: int) -> float:
    mean = math.fsum(rewards) / len(rewards)
    return (rewards[i] - mean) / mean if mean else 0.0


def opo(rewards: list[float], tokens: list[int], i: int) -> float:
    weighted = math.fsum(r * n for r, n in zip(rewards, tokens, strict=True))
    return rewards[i] - weighted / sum(tokens) if sum(tokens) else 0.0


BY_HAND: dict[str, Callable[[list[float], list[int], int], float]] = {
    "group": group,
    "rloo": rloo,
    "maxrl": maxrl,
    "opo": opo,
    "reward": lambda rewards, tokens, i: rewards[i],
}


def by_hand(case: Case, name: str, normalize: str) -> list[float]:
    rewards, groups, tokens = case
    made = [0.0] * len(rewards)
    for label in set(groups):
        mine = [i for i, owner in enumerate(groups) if owner == label]
        inside = [rewards[i] for i in mine]
        for place, i in enumerate(mine):
            made[i] = BY_HAND[name](inside, [tokens[j] for j in mine], place)
        if name != "reward" and len(set(inside)) == 1:
            for i in mine:
                made[i] = 0.0
        if normalize == "group":
            mean = math.fsum(made[i] for i in mine) / len(mine)
            deviation = math.sqrt(math.fsum((made[i] - mean) ** 2 for i in mine) / len(mine))
            for i in mine:
                made[i] /= deviation + 1e-6
    if normalize == "batch":
        mean = math.fsum(made) / len(made)
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in made) / len(made))
        made = [(x - mean) / (deviation + 1e-6) for x in made]
    return made


@pytest.mark.parametrize("normalize", ["none", "group", "batch"])
@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_advantages(name: str, normalize: str) -> None:
    case = batch(7)
    config = AlgorithmConfig.model_validate({"advantage": name, "normalize": normalize})
    rewards, groups, tokens = (np.array(part) for part in case)
    got = make_algorithm(config).advantages(rewards, groups, tokens)
    np.testing.assert_allclose(got, by_hand(case, name, normalize), rtol=0, atol=1e-9)


def test_maxrl_refuses_negative_rewards() -> None:
    algorithm = make_algorithm(AlgorithmConfig(name="maxrl"))
    with pytest.raises(InputError, match=r"rewards of 0 or more, got -1"):
        algorithm.advantages(np.array([1.0, -1.0]), np.array([0, 0]))


@agl.advantage("test_median")
def median(inputs: AdvantageInputs, config: AlgorithmConfig) -> Any:
    middles = [np.median(inputs.rewards[inputs.group == g]) for g in range(inputs.group.max() + 1)]
    return inputs.rewards - np.array(middles)[inputs.group]


def test_a_registered_function_is_found_by_its_name() -> None:
    algorithm = make_algorithm(AlgorithmConfig(advantage="test_median"))
    got = algorithm.advantages(np.array([0.0, 1.0, 5.0]), np.array([4, 4, 4]))
    assert got.tolist() == [-1.0, 0.0, 4.0]


def test_a_function_in_a_file_needs_no_registration(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def twice(inputs, config):\n    return 2 * inputs.rewards\n")
    algorithm = make_algorithm(AlgorithmConfig(advantage="mine.py:twice"), tmp_path)
    assert algorithm.advantages(np.array([0.0, 1.0]), np.array([0, 0])).tolist() == [0.0, 2.0]


def test_a_file_named_in_imports_registers_its_functions(tmp_path: Path) -> None:
    (tmp_path / "registers.py").write_text(
        "import agl_ray as agl\n\n@agl.advantage('thrice')\ndef thrice(inputs, config):\n    return 3 * inputs.rewards\n"
    )
    config = AlgorithmConfig(imports=["registers.py"], advantage="thrice")
    algorithm = make_algorithm(config, tmp_path)
    assert algorithm.advantages(np.array([0.0, 1.0]), np.array([0, 0])).tolist() == [0.0, 3.0]


def test_an_unknown_name_is_refused_with_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"algorithm.advantage: expected one of .*'rloo'"):
        make_algorithm(AlgorithmConfig(advantage="grpo_typo"))
    with pytest.raises(ConfigError, match=r"algorithm.loss: expected one of .*'gspo'"):
        make_algorithm(AlgorithmConfig(loss="typo"))


def test_a_function_that_gives_no_finite_numbers_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(
        "import numpy as np\n\ndef nan(inputs, config):\n    return inputs.rewards * np.nan\n\n"
        "def short(inputs, config):\n    return inputs.rewards[:1]\n"
    )
    for name in ("nan", "short"):
        algorithm = make_algorithm(AlgorithmConfig(advantage=f"bad.py:{name}"), tmp_path)
        with pytest.raises(InputError, match=rf"bad.py:{name}: expected 2 finite numbers"):
            algorithm.advantages(np.array([0.0, 1.0]), np.array([0, 0]))
