"""The critic's section: it acts with a critic's advantage, and is refused where it would do nothing."""

from __future__ import annotations

from typing import Any

import pytest

from agl_ray.config.load import validate
from agl_ray.types import ConfigError

BASE = {"model": {"path": "m"}}
PPO = {"algorithm": {"name": "ppo"}}
ROLLOUT = {"algorithm": {"name": "ppo", "gae_over": "rollout"}}
ALONE = {"rollout": {"group_size": 1, "min_group": 1}}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"learner": {"critic": {"lr": 3e-3}}}, r"learner\.critic\.lr acts with algorithm\.advantage gae"),
        (
            {"learner": {"critic": {"epochs": 2}}, "algorithm": {"advantage": "mine.py:twice"}},
            r"learner\.critic\.epochs acts with algorithm\.advantage gae",
        ),
        ({"learner": {"critic": {"value_clip": 0}}}, r"value_clip"),
        ({"algorithm": {"gae_over": "rollout"}}, "algorithm.gae_over acts with advantage: gae only"),
        ({"algorithm": {"name": "ppo", "normalize": "group"}}, "gae has no groups"),
        ({**PPO, "credit": {"unit": "role", "group": "row+role"}}, "compares none; leave it out"),
        (ROLLOUT, "with credit.unit rollout there is one"),
        ({**ROLLOUT, "credit": {"unit": "call"}}, "count once for every unit; say last or none"),
        (ALONE, "rollout.min_group: expected 2 or more, got 1"),
        ({**ALONE, "algorithm": {"name": "rloo"}}, "advantage rloo compares the rollouts"),
    ],
)  # fmt: skip
def test_what_would_do_nothing_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate({**BASE, **given})


@pytest.mark.parametrize(
    "given",
    [
        {**PPO, "learner": {"critic": {"lr": 3e-3, "value_clip": None}}},
        {**PPO, **ALONE},
        {**ALONE, "algorithm": {"name": "reinforce_pp"}},
        {**PPO, "credit": {"unit": "call"}},
        {**ROLLOUT, "credit": {"unit": "call", "outcome": "last"}},
        {"algorithm": {"imports": ["m.py"], "advantage": "mine"}, "learner": {"critic": {"lr": 1e-4}}},
    ],
)  # fmt: skip
def test_what_acts_is_taken(given: dict[str, Any]) -> None:
    config = validate({**BASE, **given})
    assert validate(config.model_dump(mode="json")) == config
