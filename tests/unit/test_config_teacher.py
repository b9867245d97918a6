"""The section algorithm.teacher and the preset opd: what would do nothing, or be overlooked, is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agl_ray.algorithms.algorithm import make_algorithm
from agl_ray.config.load import resolved_json, validate
from agl_ray.config.teacher import TeacherConfig
from agl_ray.types import ConfigError

BASE = {"model": {"path": "m"}}
TEACHER = {"base_url": "http://teacher:8000/v1", "model": "large"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"teacher": {"model": "large"}}, "base_url"),
        ({"teacher": {**TEACHER, "base_url": "teacher:8000"}}, "expected http://"),
        ({"teacher": {**TEACHER, "coefficient": 0.0}}, "coefficient: expected more than 0"),
        (
            {"teacher": {**TEACHER, "request_seconds": 400.0}},
            r"request_seconds \(400\) is beyond deadline_seconds",
        ),
        ({"name": "opd"}, "nothing would be learnt; give algorithm.teacher"),
        ({"advantage": "none", "kl": {"coefficient": 0.0}}, "nothing would be learnt"),
        (
            {"name": "opd", "teacher": TEACHER, "normalize": "batch"},
            "algorithm.normalize batch has no effect with advantage none",
        ),
        (
            {
                "name": "opd",
                "teacher": TEACHER,
                "kl": {"coefficient": 0.1, "where": "reward"},
            },
            "algorithm.kl.where reward has no effect with advantage none",
        ),
        ({"name": "dapo", "teacher": TEACHER}, "with algorithm.teacher every group teaches"),
    ],
)
def test_what_would_do_nothing_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate({**BASE, "algorithm": given})


def test_the_student_is_sampled_from_what_is_compared() -> None:
    given = {**BASE, "algorithm": {"name": "opd", "teacher": TEACHER}}
    with pytest.raises(ConfigError, match=r"rollout.temperature: expected 1 .*got 0\.7"):
        validate({**given, "rollout": {"temperature": 0.7}})
    assert validate({**given, "rollout": {"group_size": 1, "min_group": 1}}).algorithm.teacher


def test_it_goes_with_every_advantage_and_its_rows_are_all_needed() -> None:
    for name in ("opd", "grpo", "rloo", "ppo", "dppo"):
        config = validate({**BASE, "algorithm": {"name": name, "teacher": TEACHER}})
        assert not make_algorithm(config.algorithm).skip_zero_advantage
        assert validate(json.loads(resolved_json(config))) == config  # as a resumed run reads it


def test_a_local_folder_teaches_through_the_divergence() -> None:
    given = {"advantage": "none", "kl": {"coefficient": 1.0, "reference": "folder"}}
    assert validate({**BASE, "algorithm": given}).algorithm.kl.in_loss


def test_the_key_is_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TeacherConfig(**TEACHER, api_key_env="TEACHER_KEY")
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"teacher\.api_key_env: .*TEACHER_KEY"):
        config.key()
    monkeypatch.setenv("TEACHER_KEY", "secret")
    assert config.key() == "secret"
    assert config.root == "http://teacher:8000"
