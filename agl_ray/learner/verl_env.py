"""The Python environment that learner ranks of `learner.backend: verl` run in, looked at before anything is started in it.

verl asks for an older transformers than vLLM, so it has an environment of its own (`make venv-verl`), into which Ray starts the ranks. Ray
joins only processes of one Python and one Ray. Called by actors/session.py and cli/check.py (a local Ray) and, on the learner's own nodes, by
actors/learner_group.py. Needs nothing but the standard library and Ray. Test it alone with tests/unit/test_learner_verl_env.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from agl_ray.types.errors import ConfigError

TESTED = "0.9.1"
"""The version of verl that the tests of learner.backend verl run with (cluster/locks/verl-env.lock)."""
SECONDS = 60.0
PROBE = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
def of(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None
print(json.dumps({"python": sys.version.split()[0], "ray": of("ray"), "verl": of("verl"), "agl_ray": find_spec("agl_ray") is not None}))
"""
ADVICE = "make it with `make venv-verl`, with the Python of this environment"


def python_of(folder: str) -> Path:
    """The interpreter of the environment in `folder`."""
    return Path(folder).expanduser() / "bin" / "python"


def check_environment(folder: str) -> None:
    """ConfigError says what the environment in `folder` of this machine lacks, or has in another version than this process."""
    found = _probe(folder)
    here = {"python": sys.version.split()[0], "ray": version("ray")}
    for name, wanted in here.items():
        if found[name] != wanted:
            raise ConfigError(
                f"learner.verl_env {folder}: expected {name} {wanted}, as here, got {found[name] or 'none'}; Ray joins no others; {ADVICE}"
            )
    if found["verl"] != TESTED:
        raise ConfigError(
            f"learner.verl_env {folder}: expected verl {TESTED}, got {found['verl'] or 'none'}; {ADVICE}"
        )
    if not found["agl_ray"]:
        raise ConfigError(
            f"learner.verl_env {folder}: expected agl_ray in it, found none; {ADVICE}, or `{python_of(folder)} -m pip install --no-deps -e .`"
        )


def _probe(folder: str) -> dict[str, str | bool | None]:
    python = python_of(folder)
    try:
        done = subprocess.run(
            [str(python), "-c", PROBE],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=True,
        )
        found: dict[str, str | bool | None] = json.loads(done.stdout)
    except FileNotFoundError as error:
        raise ConfigError(
            f"learner.verl_env {folder}: expected a Python environment ({python}), found none; {ADVICE}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise _does_not_run(folder, f"no answer within {SECONDS:g} s") from error
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise _does_not_run(folder, getattr(error, "stderr", None) or str(error)) from error
    return found


def _does_not_run(folder: str, why: str) -> ConfigError:
    return ConfigError(
        f"learner.verl_env {folder}: expected a Python environment, but {python_of(folder)} does not run: {why.strip()[-300:]}; {ADVICE}"
    )
