"""PostgreSQL for tests: the server that AGL_TEST_POSTGRES_URL names, or one of our own from cluster/services.sh.

A test module that needs it says `pytest_plugins = ["services"]` and uses the fixture `postgres_url` (of the session: one server, stopped
after the last test) or `run_id` (of the test: a fresh run in that database, whose rows are dropped afterwards), or
`postgres_server` (a server of the test's own, which it may stop and start). Where no server can be had, these tests fail;
they are never skipped.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "cluster" / "services.sh"
VARIABLE = "AGL_TEST_POSTGRES_URL"
START_SECONDS = 300  # an installation from the distribution's packages included
STOP_SECONDS = 90


class PostgresServer:
    """A private server with its data in `folder`; use it as a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self) -> str:
        """Start it, for the first time or again (on the same port); gives its URL."""
        line = self._script("start", seconds=START_SECONDS)
        return line.strip().removeprefix(f"{VARIABLE}=")

    def stop(self, mode: str = "fast") -> None:
        """`fast`: sessions are told; `immediate`: as after a crash."""
        self._script("stop", mode, seconds=STOP_SECONDS)

    def _script(self, verb: str, *more: str, seconds: float) -> str:
        command = ["bash", str(SCRIPT), verb, str(self.folder), *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        assert done.returncode == 0, f"{' '.join(command)}:\n{done.stderr}"
        return done.stdout

    def __enter__(self) -> PostgresServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop("immediate")
        shutil.rmtree(self.folder)


def own_server() -> PostgresServer:
    """In a fresh folder, which PostgreSQL's own user can reach."""
    folder = Path(tempfile.mkdtemp(prefix="agl-pg"))
    folder.chmod(0o755)
    return PostgresServer(folder)


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    given = os.environ.get(VARIABLE)
    if given:
        yield given
        return
    with own_server() as server:
        yield server.start()


@pytest.fixture
def postgres_server() -> Iterator[PostgresServer]:
    """Not started yet."""
    with own_server() as server:
        yield server


@pytest.fixture
def run_id(postgres_url: str) -> Iterator[str]:
    name = f"test-{secrets.token_hex(6)}"
    yield name
    drop_run(postgres_url, name)


def drop_run(url: str, run_id: str) -> None:
    """Remove every row of a run (and of runs whose name continues it), from whatever tables of ours there are."""
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        tables = connection.execute(
            "SELECT table_name FROM information_schema.columns WHERE column_name = 'run_id' AND table_name LIKE 'agl_ray_%'"
        ).fetchall()
        for (table,) in tables:
            connection.execute(f'DELETE FROM "{table}" WHERE starts_with(run_id, %s)', [run_id])
