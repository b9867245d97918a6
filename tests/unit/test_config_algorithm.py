"""Presets of algorithms: what is given wins, what would do nothing is refused."""

from __future__ import annotations

import pytest

from agl_ray.algorithms.algorithm import make_algorithm
from agl_ray.config.algorithm import PRESETS, AlgorithmConfig
from agl_ray.config.load import validate
from agl_ray.types import ConfigError

BASE = {"model": {"path": "m"}}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_name_fills_the_switches_and_what_is_given_wins(name: str) -> None:
    base = {**BASE, "learner": {"minibatches": 2}}  # kl_cov needs them
    given: dict[str, object] = {"name": name}
    if name == "opd":
        given["teacher"] = {"base_url": "http://teacher/v1", "model": "m"}
    config = validate({**base, "algorithm": given}).algorithm
    for key, value in PRESETS[name].items():
        assert getattr(config, key) == value
    other = validate({**base, "algorithm": {**given, "clip_high": 0.31}}).algorithm
    assert other.clip_high == 0.31
    again = validate({**base, "algorithm": config.model_dump(mode="json")}).algorithm
    assert again == config  # as a resumed run reads it


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"algorithm.name: expected one of .*'gspo'.*got 'grop'"):
        validate({**BASE, "algorithm": {"name": "grop"}})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tis_cap": 3.0}, "algorithm.tis_cap acts with correction: tis or seq-tis only"),
        ({"unit": "row"}, "algorithm.unit acts with aggregation: seq-mean"),
        ({"refill_batches": 2.0}, "algorithm.refill_batches acts with zero_signal: refill only"),
        ({"name": "dapo", "normalize": "batch"}, "normalize batch gives every group others"),
        ({"icepop_low": 6.0}, "algorithm.icepop_low must be below"),
    ],
)
def test_a_switch_that_would_do_nothing_is_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate({**BASE, "algorithm": given})


@pytest.mark.parametrize(
    "credit",
    [{"unit": "call"}, {"unit": "role"}, {"outcome": "none"}, {"weights": {"style": 1.0}}],
)
def test_refill_is_refused_where_rewards_of_rollouts_do_not_decide(
    credit: dict[str, object],
) -> None:
    words = f"zero_signal refill knows .* credit.{next(iter(credit))} .* say algorithm.zero_signal: keep"
    with pytest.raises(ConfigError, match=words):
        validate({**BASE, "algorithm": {"name": "dapo"}, "credit": credit})
    kept = {"name": "dapo", "zero_signal": "keep"}
    assert validate({**BASE, "algorithm": kept, "credit": credit}).algorithm.zero_signal == "keep"


def test_refill_is_refused_where_equal_rewards_may_have_signal() -> None:
    with pytest.raises(ConfigError, match="expected an advantage whose baseline is the group's"):
        make_algorithm(AlgorithmConfig(advantage="reward", zero_signal="refill"))


def test_the_defaults_are_the_safe_ones() -> None:
    config = AlgorithmConfig()
    assert (config.advantage, config.loss, config.aggregation) == ("group", "clip", "token-mean")
    assert (config.normalize, config.correction, config.clip_high) == ("none", "icepop", 0.28)
