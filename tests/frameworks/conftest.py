"""What the tests of other frameworks' agents share: a gateway over a real engine for the session.

    make test-frameworks        sets up .venv-frameworks and .venv-crewai, and runs tests/frameworks

FRAMEWORKS_VENVS names another folder that the two environments are in. Left out of `make test`: the frameworks are 1.7 GB of
other people's packages.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from agent_programs import HERE, Gateway, environment_of

from actors.engine_vllm import engine_environment
from agl_ray.config.models import EngineConfig


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    for venv in (".venv-frameworks", ".venv-crewai"):
        environment_of(venv)  # before the engine takes its minute
    folder = tmp_path_factory.mktemp("gateway")
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "gateway_process.py"), str(folder)],
            env={**os.environ, **engine_environment(EngineConfig())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            yield Gateway(process)
        finally:
            process.stdin.close()  # type: ignore[union-attr]
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
