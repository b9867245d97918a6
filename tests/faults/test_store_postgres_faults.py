"""A store process killed under load, again and again, and a database that goes away: nothing acknowledged is lost, nothing is there twice.

Real processes and a real server (tests/services.py). The kills run over SQLite as well.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import store_load
from store_load import Load, Seen, check

from agl_ray.store import LightningStore, StoreCore
from agl_ray.store.journals.base import Query
from agl_ray.store.journals.postgres import PostgresJournal
from agl_ray.store.journals.settings import JournalSettings
from agl_ray.types import StoreError

if TYPE_CHECKING:
    from services import PostgresServer

pytest_plugins = ["services"]
pytestmark = pytest.mark.slow

KILLS = 20
LEAST_NOTES = 40  # of a sitting, before it is killed


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """(url, run id)"""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/store.db", "default"
    return request.getfixturevalue("postgres_url"), request.getfixturevalue("run_id")


def sit_and_be_killed(url: str, run_id: str, number: int, seen: Seen, rng: random.Random) -> None:
    command = [sys.executable, store_load.__file__, url, run_id, str(number)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        kill_at = float("inf")
        for notes, line in enumerate(process.stdout):
            if not line.endswith(b"\n"):
                break  # cut by the kill
            kind, *what = json.loads(line)
            seen.note(kind, *what)
            if notes == LEAST_NOTES:
                kill_at = time.monotonic() + rng.uniform(0.0, 0.5)
            if time.monotonic() > kill_at:
                process.kill()  # what it has written until now is still read
                kill_at = float("inf")
        errors = process.stderr.read().decode()
        assert process.wait() == -9, errors


def test_20_kills_in_a_row(place: tuple[str, str]) -> None:
    url, run_id = place
    seen, rng = Seen(), random.Random(7)
    for number in range(KILLS):
        sit_and_be_killed(url, run_id, number, seen, rng)
    counted = asyncio.run(check(url, JournalSettings(run_id=run_id), seen))
    assert counted["starts"] == KILLS + 1
    assert counted["spans"] >= len(seen.spans) > KILLS
    assert counted["attempts"] > len(seen.rewards)  # the kills did cut attempts short


Change = Callable[[], None]


async def under_load(url: str, run_id: str, changes: list[Change]) -> Seen:
    """Load on a store while the server is stopped and started; any error of the store is raised here."""
    seen = Seen()
    settings = JournalSettings(run_id=run_id)
    core = await StoreCore.open(url, settings=settings, lease_seconds=120.0)
    load = Load(LightningStore.local(core), "load", seen.note)
    running = asyncio.create_task(load.run())
    for change in changes:
        await until_more(seen, running)
        await asyncio.to_thread(change)
    await until_more(seen, running)
    load.stopping = True
    await running
    await core.close()
    return seen


async def until_more(seen: Seen, running: asyncio.Task[None]) -> None:
    """Until the load has gone on for a while."""
    wanted = len(seen.rewards) + 30
    while len(seen.rewards) < wanted:
        if running.done():
            running.result()
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_database_that_comes_back_in_time_is_only_slow(
    postgres_server: PostgresServer, mode: str
) -> None:
    url = postgres_server.start()

    def restart() -> None:
        postgres_server.stop(mode)
        time.sleep(1.5)
        postgres_server.start()

    seen = asyncio.run(under_load(url, "r", [restart] * 3))
    counted = asyncio.run(check(url, JournalSettings(run_id="r"), seen))
    assert counted["spans"] == len(seen.spans)
    assert counted["attempts"] == len(seen.rewards)
    assert counted["starts"] == 2


def test_a_database_that_stays_away_is_an_error_and_its_return_is_used(
    postgres_server: PostgresServer,
) -> None:
    from journal_contract import rollout

    url = postgres_server.start()

    async def main() -> None:
        journal = PostgresJournal(url, "r")
        await journal.open()
        await journal.write([rollout("before")], [])
        await asyncio.to_thread(postgres_server.stop)
        patience, journal._server.seconds = journal._server.seconds, 2.0
        with pytest.raises(StoreError, match=r"cannot write: .*refused.*start the server"):
            await journal.write([rollout("lost")], [])
        with pytest.raises(StoreError, match="cannot read"):
            await journal.rows("rollout", ["before"])
        await asyncio.to_thread(postgres_server.start)
        journal._server.seconds = patience
        await journal.write([rollout("after")], [])
        found = await journal.query(Query("rollout"))
        assert [row.key for row in found.rows] == ["after", "before"]
        await journal.close()

    asyncio.run(main())
