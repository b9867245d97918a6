"""What the tests of learner.backend verl share: its environment.

    make test-verl        sets up .venv-verl and runs tests/verl

VERL_ENV names another environment. Left out of `make test`: verl and what it asks for are 2 GB.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agl_ray.learner.verl_env import check_environment

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def environment() -> str:
    """The folder of verl's environment. Not there = an error, no skip."""
    folder = os.environ.get("VERL_ENV", str(REPO / ".venv-verl"))
    check_environment(folder)
    return folder
