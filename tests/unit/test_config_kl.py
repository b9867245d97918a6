"""The section algorithm.kl: what would do nothing is refused; where the reference is looked up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agl_ray.config.algorithm import located_reference
from agl_ray.config.kl import KLConfig, reference_folder
from agl_ray.config.load import resolved_json, validate
from agl_ray.types import ConfigError, InputError

BASE = {"model": {"path": "m"}}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"where": "reward"}, "algorithm.kl.where needs algorithm.kl.coefficient"),
        ({"reference": "x"}, "algorithm.kl.reference needs algorithm.kl.coefficient"),
        (
            {"coefficient": 0.0, "estimator": "k3"},
            "kl.estimator has no effect with .*coefficient 0",
        ),
        ({"coefficient": 0.1, "where": "reward", "weighted": False}, "acts with where: loss only"),
        ({"coefficient": 0.1, "estimator": "k1", "weighted": False}, "nothing but noise"),
        ({"coefficient": -0.1}, "kl.coefficient: expected at least 0"),
        ({"coefficient": 0.1, "estimator": "k4"}, "expected one of 'k1', 'k2' or 'k3'"),
    ],
)
def test_what_would_do_nothing_is_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate({**BASE, "algorithm": {"kl": given}})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("maxrl", "maxrl needs rewards of 0 or more"),
        ("dapo", "refill knows a group's advantages from its rollouts' rewards alone"),
    ],
)
def test_a_penalty_of_rewards_is_not_for_all(name: str, words: str) -> None:
    kl = {"coefficient": 0.1, "where": "reward"}
    with pytest.raises(ConfigError, match=words):
        validate({**BASE, "algorithm": {"name": name, "kl": kl}})


def test_the_default_estimator_has_the_right_gradient() -> None:
    assert KLConfig(coefficient=0.1).estimate == "k2"
    assert KLConfig(coefficient=0.1, where="reward").estimate == "k1"
    measured = KLConfig(coefficient=0.0)
    assert (measured.on, measured.in_loss, measured.in_reward) == (True, False, False)
    assert not KLConfig().on


def test_a_resumed_run_reads_the_same_section() -> None:
    kl = {"coefficient": 0.1, "where": "reward", "estimator": "k3", "reference": "/models/one"}
    config = validate({**BASE, "algorithm": {"kl": kl}})
    assert validate(json.loads(resolved_json(config))) == config


def test_the_reference_is_a_model_folder_or_a_checkpoint(tmp_path: Path) -> None:
    assert reference_folder(KLConfig(coefficient=0.1), tmp_path) is None
    with pytest.raises(InputError, match=r"algorithm\.kl\.reference: there is no folder step-7"):
        reference_folder(KLConfig(coefficient=0.1, reference="step-7"), tmp_path)
    (tmp_path / "step-7").mkdir()
    with pytest.raises(InputError, match=r"algorithm\.kl\.reference: .*config\.json"):
        reference_folder(KLConfig(coefficient=0.1, reference="step-7"), tmp_path)
    (tmp_path / "step-7" / "position.json").write_text("{}")
    algorithm = validate(
        {**BASE, "algorithm": {"kl": {"coefficient": 0.1, "reference": "step-7"}}}
    ).algorithm
    assert located_reference(algorithm, tmp_path).kl.reference == str(tmp_path / "step-7")
