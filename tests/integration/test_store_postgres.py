"""The PostgreSQL journal over a real server: the contract of all journals, and what only a database can get wrong."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from journal_contract import JournalContract, Storage, rollout

from agl_ray.store.journals import postgres, postgres_owner
from agl_ray.store.journals.base import EventRow, Journal, Query, SpanRow
from agl_ray.store.journals.postgres import PostgresJournal
from agl_ray.types import InputError, StoreError

pytest_plugins = ["services"]

SPANS = [SpanRow(f"b{i}", ("ro", "at"), i + 1, 1, b"payload" * i) for i in range(1, 5)]


class TestPostgres(JournalContract):
    @pytest.fixture
    def storage(self, postgres_url: str, run_id: str) -> Storage:
        numbers = itertools.count()

        def fresh() -> Callable[[], Journal]:
            name = f"{run_id}/{next(numbers)}"
            return lambda: PostgresJournal(postgres_url, name)

        return Storage(fresh, examples=12)


def use(journal: PostgresJournal, work: Callable[[PostgresJournal], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        try:
            await journal.open()
            return await work(journal)
        finally:
            await journal.close()

    return asyncio.run(main())


def sql(url: str, text: str, *values: Any) -> list[Any]:
    with psycopg.connect(url, autocommit=True) as connection:
        done = connection.execute(text, values)
        return done.fetchall() if done.description else []


def backends(url: str, run_id: str) -> list[int]:
    """The server's processes of a run's journals."""
    found = sql(
        url,
        "SELECT pid FROM pg_stat_activity WHERE application_name = %s",
        f"agl-ray store {run_id}",
    )
    return [pid for (pid,) in found]


# Runs beside one another.


def test_runs_share_a_database_and_nothing_else(postgres_url: str, run_id: str) -> None:
    async def main() -> None:
        one, other = (PostgresJournal(postgres_url, f"{run_id}/{i}") for i in range(2))
        await asyncio.gather(one.open(), other.open())
        await one.write([rollout("ro", 1, mode="one")], SPANS, [EventRow(1, b"1")])
        await other.write([rollout("ro", 1, mode="other")], SPANS[:1], [])
        await one.forget(["ro"])
        assert (await one.query(Query("rollout", count=True))) == ([], 0)
        (row,) = await other.rows("rollout", ["ro"])
        assert row.columns[2] == "other"
        assert await other.payloads([("ro", "at")]) == SPANS[:1]
        assert await other.events(0, 10) == []
        await one.close()
        await other.close()

    asyncio.run(main())


def test_a_second_store_of_a_living_run_is_refused(
    postgres_url: str, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "LOCK_SECONDS", 0.3)

    async def main() -> None:
        first, second = (PostgresJournal(postgres_url, run_id) for _ in range(2))
        await first.open()
        with pytest.raises(
            StoreError, match=r"another living store owns this run \(process \S+:\d"
        ):
            await second.open()
        await second.close()
        await first.write([rollout("a")], [])
        await first.close()
        monkeypatch.undo()  # the server may take its time to free the lock
        assert (await second.open()).starts == 2
        await second.close()

    asyncio.run(main())


def test_a_killed_store_leaves_its_run_free(postgres_url: str, run_id: str) -> None:
    script = (
        "import asyncio, sys; from agl_ray.store.journals.postgres import PostgresJournal\n"
        "async def main():\n"
        "    await PostgresJournal(sys.argv[1], sys.argv[2]).open()\n"
        "    print('open', flush=True); await asyncio.sleep(600)\n"
        "asyncio.run(main())"
    )
    command = [sys.executable, "-c", script, postgres_url, run_id]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"open\n"
        owner.kill()
        owner.wait()

    async def nothing(journal: PostgresJournal) -> None:
        del journal

    use(PostgresJournal(postgres_url, run_id), nothing)


def test_a_store_whose_run_was_taken_over_writes_no_more(postgres_url: str, run_id: str) -> None:
    """Its connections are cut while a successor waits for the lock, which therefore gets it."""

    async def main() -> None:
        old, new = (PostgresJournal(postgres_url, run_id) for _ in range(2))
        await old.open()
        await old.write([rollout("a", mode="old")], [])
        (owner,) = sql(postgres_url, "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND pid = ANY(%s)", backends(postgres_url, run_id))  # fmt: skip
        opening = asyncio.create_task(new.open())
        while not sql(postgres_url, "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND pid = ANY(%s)", backends(postgres_url, run_id)):  # fmt: skip  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        sql(postgres_url, "SELECT pg_terminate_backend(%s)", owner[0])
        await opening
        with pytest.raises(StoreError, match="another store has taken this run over"):
            await old.write([rollout("a", mode="too late")], [])
        with pytest.raises(StoreError, match="taken this run over"):
            await old.forget(["a"])
        (row,) = await new.rows("rollout", ["a"])
        assert row.columns[2] == "old"
        await new.write([rollout("a", mode="new")], [])
        await old.close()
        await new.close()

    asyncio.run(main())


def test_a_broken_owner_connection_is_mended(
    postgres_url: str, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "LOCK_SECONDS", 0.3)

    async def main() -> None:
        journal, second = (PostgresJournal(postgres_url, run_id) for _ in range(2))
        await journal.open()
        for number in range(3):
            for pid in backends(postgres_url, run_id):
                sql(postgres_url, "SELECT pg_terminate_backend(%s)", pid)
            await journal.write([rollout("a", number)], [])
            while not sql(postgres_url, "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND granted AND pid = ANY(%s)", backends(postgres_url, run_id)):  # fmt: skip  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        with pytest.raises(StoreError, match="another living store"):
            await second.open()
        await second.close()
        await journal.close()

    asyncio.run(main())


def test_our_own_ghost_does_not_keep_us_out(
    postgres_url: str, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection broke on our side only: the server still holds the lock for it."""
    monkeypatch.setattr(postgres_owner, "LOCK_SECONDS", 0.3)

    async def main() -> None:
        journal = PostgresJournal(postgres_url, run_id)
        await journal.open()
        owner = journal._owner
        assert owner is not None
        assert owner._keeper is not None
        owner._keeper.cancel()
        ghost, owner._connection = owner._connection, None  # forgotten, not closed
        await owner._retake()
        await journal.write([rollout("a")], [])
        assert ghost is not None
        await ghost.invalidate()
        await ghost.close()
        await journal.close()

    asyncio.run(main())


# Writing twice.


class LostAnswer:
    """Between a journal and its server: once armed, the next COMMIT reaches the server and its answer never comes back."""

    def __init__(self, url: str) -> None:
        self._target = sa.make_url(url)
        self.armed, self.lost = False, 0
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[Any]] = set()

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        return self._target.set(port=port).render_as_string(hide_password=False)

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()
        await asyncio.wait(self._serving)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        up = await asyncio.open_connection(self._target.host, self._target.port)
        cut = asyncio.Event()

        async def forward() -> None:
            while data := await reader.read(2**16):
                if self.armed and b"COMMIT" in data:
                    self.armed = False
                    self.lost += 1
                    cut.set()
                up[1].write(data)

        async def back() -> None:
            while data := await up[0].read(2**16):
                if cut.is_set():
                    return
                writer.write(data)

        tasks = [asyncio.create_task(forward()), asyncio.create_task(back())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for one in tasks:
            one.cancel()
        await asyncio.wait(tasks)
        for side in (up[1], writer):
            side.close()
            with contextlib.suppress(OSError):  # it was cut
                await side.wait_closed()


def test_a_commit_whose_answer_was_lost_is_repeated_without_doubling(
    postgres_url: str, run_id: str
) -> None:
    async def main() -> None:
        proxy = LostAnswer(postgres_url)
        journal = PostgresJournal(await proxy.start(), run_id)
        try:
            await journal.open()
            proxy.armed = True
            await journal.write([rollout("ro", 1)], SPANS, [EventRow(1, b"e")])
            assert proxy.lost == 1
            assert await journal.payloads([("ro", "at")]) == SPANS
            assert await journal.events(0, 10) == [EventRow(1, b"e")]
            assert (await journal.query(Query("rollout", count=True))).total == 1
        finally:
            await journal.close()
            await proxy.stop()

    asyncio.run(main())


def test_a_batch_that_is_there_with_other_content_is_refused_with_its_whole_write(
    postgres_url: str, run_id: str
) -> None:
    async def work(journal: PostgresJournal) -> None:
        await journal.write([rollout("ro")], SPANS)
        other = SPANS[1]._replace(payload=b"other")
        with pytest.raises(StoreError, match=r"'b2' of rollout 'ro'.*other content"):
            await journal.write([rollout("new")], [other])
        assert await journal.rows("rollout", ["new"]) == []
        assert await journal.payloads([("ro", "at")]) == SPANS

    use(PostgresJournal(postgres_url, run_id), work)


def test_damage_is_noticed(postgres_url: str, run_id: str) -> None:
    async def work(journal: PostgresJournal) -> None:
        await journal.write([], SPANS)
        sql(postgres_url, "UPDATE agl_ray_spans SET payload = set_byte(payload, 3, 0) WHERE run_id = %s AND batch_id = 'b2'", run_id)  # fmt: skip
        with pytest.raises(
            StoreError, match=r"spans 3 to 3 of rollout ro are damaged \(checksum\)"
        ):
            await journal.payloads([("ro", "at")])

    use(PostgresJournal(postgres_url, run_id), work)


def test_half_a_surrogate_pair_is_refused(postgres_url: str, run_id: str) -> None:
    async def work(journal: PostgresJournal) -> None:
        with pytest.raises(InputError, match="UTF-8"):
            await journal.write([rollout("\ud800")], [])
        with pytest.raises(InputError, match="UTF-8"):
            await journal.rows("rollout", ["\ud800"])
        await journal.write([rollout("a")], [])

    use(PostgresJournal(postgres_url, run_id), work)
