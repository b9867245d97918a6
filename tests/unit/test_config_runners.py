"""The section `runners`: pools of a fixed size or between two, and what Ray is to give each runner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from actors.runner import runner_options
from agl_ray.config.load import load_config
from agl_ray.config.runners import RunnersConfig
from agl_ray.types.errors import ConfigError


def test_a_pool_is_fixed_unless_it_is_given_room() -> None:
    fixed, elastic = RunnersConfig(num_runners=3), RunnersConfig(min_runners=0, max_runners=4)
    assert (fixed.elastic, fixed.fewest, fixed.most) == (False, 3, 3)
    assert (elastic.elastic, elastic.fewest, elastic.most) == (True, 0, 4)
    again = RunnersConfig.model_validate(elastic.model_dump(mode="json"))
    assert again == elastic


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"min_runners": 1}, "give min_runners and max_runners together"),
        ({"min_runners": 3, "max_runners": 2}, "(3) is larger than runners.max_runners (2)"),
        ({"num_runners": 2, "min_runners": 1, "max_runners": 2}, "leave it out"),
        ({"idle_seconds": 5.0}, "acts together with runners.max_runners only"),
        ({"resources": {"CPU": 2.0}}, "runners.num_cpus for CPUs"),
        ({"resources": {"GPU": 1.0}}, "GPU is not a custom resource"),
        ({"runtime_env": {"pipp": ["x"]}}, "got 'pipp'"),
        ({"runtime_env": {"env_vars": {"A": 1}}}, "must be of type Dict[str, str]"),
        # The whole of what Ray says, to its last line.
        ({"runtime_env": {"pip": ["x"], "uv": ["y"]}}, "create-env-file-manually"),
        ({"runtime_env": {"working_dir": "."}}, "expected the URI of an archive"),
        ({"runtime_env": {"py_modules": ["./mine"]}}, "got './mine'"),
        ({"runtime_env": {"image_uri": "a/b", "pip": ["x"]}}, "image_uri"),
    ],
)
def test_what_cannot_be_is_refused_with_its_key(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError) as found:
        RunnersConfig.model_validate(given)
    (error,) = found.value.errors()
    assert error["msg"].startswith("Value error, runners")
    assert text in error["msg"]


@pytest.mark.parametrize(
    ("pools", "text"),
    [
        ({"spot": {"min_runners": 2, "max_runners": 1}}, "runners.pools.spot.max_runners (1)"),
        ({"spot": {"resources": {"CPU": 1.0}}}, "and runners.pools.spot.num_cpus for CPUs"),
        ({"spot": {"runtime_env": {"pipp": []}}}, "runners.pools.spot.runtime_env: expected keys"),
        ({"runner": {}}, "'runner' is the name of the pool that the section runners itself is"),
        ({"spot": {"lease_seconds": 9.0}}, "Extra inputs"),
        ({"Spot!": {}}, "String should match"),
    ],
)
def test_a_further_pool_is_refused_by_its_own_name(pools: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError) as found:
        RunnersConfig.model_validate({"pools": pools})
    (error,) = found.value.errors()
    assert text in error["msg"]


def test_pools_together() -> None:
    runners = RunnersConfig.model_validate(
        {
            "num_runners": 2,
            "concurrency": 8,
            "pools": {
                "spot": {"min_runners": 0, "max_runners": 9, "concurrency": 4},
                "box": {"num_runners": 3, "concurrency": 1},
            },
        }
    )
    assert list(runners.by_name) == ["runner", "spot", "box"]
    assert runners.capacity == 2 * 8 + 3
    assert RunnersConfig(min_runners=0, max_runners=2, concurrency=8).capacity == 8
    assert RunnersConfig.model_validate(runners.model_dump(mode="json")) == runners


def test_a_runner_gets_what_was_asked_for() -> None:
    runners = RunnersConfig(
        num_cpus=0.5,
        resources={"sandbox": 1.0},
        runtime_env={"pip": ["six"], "env_vars": {"A": "1", "OMP_NUM_THREADS": "2"}},
    )
    options = runner_options("w", runners)
    assert (options["num_cpus"], options["resources"]) == (0.5, {"sandbox": 1.0})
    assert options["runtime_env"] == {
        "pip": ["six"],
        "env_vars": {"A": "1", "OMP_NUM_THREADS": "2"},
    }
    image = RunnersConfig(runtime_env={"image_uri": "h/agents:7", "env_vars": {"A": "1"}})
    assert runner_options("w", image)["runtime_env"] == {
        "image_uri": "h/agents:7",
        "env_vars": {"A": "1", "OMP_NUM_THREADS": "1"},
    }
    bare = runner_options("w", RunnersConfig())
    assert bare["runtime_env"] == {"env_vars": {"OMP_NUM_THREADS": "1"}}


def test_overrides_reach_into_them(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {path: m}\nrunners: {resources: {sandbox: 1}}\n")
    changes = ["runners.resources.disk=2", "runners.runtime_env.env_vars.A=b"]
    runners = load_config(file, changes).runners
    assert runners.resources == {"sandbox": 1.0, "disk": 2.0}
    assert runners.runtime_env == {"env_vars": {"A": "b"}}
    with pytest.raises(
        ConfigError, match=r"runners\.resources\.disk: expected more than 0, got -2"
    ):
        load_config(file, ["runners.resources.disk=-2"])
    with pytest.raises(ConfigError, match="unknown key runners"):
        load_config(file, ["runners.resource.disk=2"])
