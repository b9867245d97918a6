"""The section `trajectory`: what it takes, and that a policy which does not exist is refused."""

from __future__ import annotations

import pytest

from agl_ray.config.load import validate
from agl_ray.types import ConfigError

BASE = {"model": {"path": "m"}}


def test_the_defaults() -> None:
    made = validate(BASE).trajectory
    assert (made.rows, made.overlong) == ("merge-prefix", "drop")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rows": "trees"}, "trajectory.rows.*merge-prefix.*per-call.*tree"),
        ({"overlong": "middle"}, "trajectory.overlong.*drop.*truncate"),
        ({"row": "per-call"}, "trajectory.row"),
    ],
)
def test_what_does_not_exist_is_refused(given: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate({**BASE, "trajectory": given})
