"""The environment of learner.backend verl: what is wrong with it is said before anything starts in it."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from actors.learner_group import runtime_env
from agl_ray.config.models import LearnerConfig
from agl_ray.learner.verl_env import TESTED, check_environment
from agl_ray.types import ConfigError

HERE = {"python": sys.version.split()[0], "ray": version("ray"), "verl": TESTED, "agl_ray": True}


def environment(folder: Path, script: str) -> str:
    """A folder with a `python` that is this shell script."""
    program = folder / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return str(folder)


def that_says(folder: Path, **changed: object) -> str:
    return environment(folder, f"echo '{json.dumps({**HERE, **changed})}'")


def test_one_like_here_is_taken(tmp_path: Path) -> None:
    check_environment(that_says(tmp_path))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"python": "3.12.1"}, r"expected python 3\.11\.\d+, as here, got 3\.12\.1"),
        ({"ray": "2.9.0"}, r"expected ray 2\.\d+\.\d+, as here, got 2\.9\.0"),
        ({"ray": None}, "expected ray .* got none"),
        ({"verl": None}, rf"expected verl {TESTED}, got none"),
        ({"verl": "0.8.0"}, rf"expected verl {TESTED}, got 0\.8\.0"),
        ({"agl_ray": False}, "expected agl_ray in it, found none"),
    ],
)
def test_another_one_is_refused_by_what_is_different(
    tmp_path: Path, changed: dict[str, object], said: str
) -> None:
    folder = that_says(tmp_path, **changed)
    with pytest.raises(ConfigError, match=rf"learner\.verl_env {folder}: {said}.*make venv-verl"):
        check_environment(folder)


def test_none_and_one_that_does_not_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a Python environment .* found none"):
        check_environment(str(tmp_path / "nowhere"))
    broken = environment(tmp_path / "broken", "echo no such library >&2; exit 3")
    with pytest.raises(ConfigError, match="does not run: no such library"):
        check_environment(broken)
    chatty = environment(tmp_path / "chatty", "echo welcome")
    with pytest.raises(ConfigError, match=r"chatty/bin/python does not run: Expecting value"):
        check_environment(chatty)
    (tmp_path / "locked" / "bin" / "python").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"does not run: .*Permission denied.*make venv-verl"):
        check_environment(str(tmp_path / "locked"))


def test_one_that_says_nothing_in_time_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agl_ray.learner.verl_env.SECONDS", 0.1)
    silent = environment(tmp_path, "exec sleep 600")
    with pytest.raises(ConfigError, match=r"does not run: no answer within 0\.1 s; make it"):
        check_environment(silent)


def test_the_probe_reads_a_real_environment() -> None:
    with pytest.raises(ConfigError, match=rf"expected verl {TESTED}, got none"):
        check_environment(sys.prefix)


def test_only_ranks_of_verl_start_in_it() -> None:
    assert "py_executable" not in runtime_env(LearnerConfig())
    made = runtime_env(LearnerConfig(backend="verl", verl_env="/opt/verl"))
    assert made["py_executable"] == "/opt/verl/bin/python"
