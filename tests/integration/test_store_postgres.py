"""The PostgreSQL journal over a real server: the contract of all journals, and what only a database can get wrong."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from journal_contract import JournalContract, Storage, rollout

from agl_ray.store.journals import postgres, postgres_owner
from agl_ray.store.journals.base import EventRow, Journal, Query, SpanRow
from agl_ray.store.journals.postgres import PostgresJournal
from agl_ray.store.journals.postgres_schema import VERSION_TABLE, Exact, metadata
from agl_ray.store.journals.settings import PoolSettings
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


@pytest.fixture
def schema_url(postgres_url: str) -> Iterator[str]:
    """The database seen through a schema of the test's own, with no table in it."""
    name = f"s{secrets.token_hex(6)}"
    sql(postgres_url, f"CREATE SCHEMA {name}")
    yield f"{postgres_url}?options=-c%20search_path%3D{name}"
    sql(postgres_url, f"DROP SCHEMA {name} CASCADE")


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


# Errors of the address and of rights.


def refused(url: str, run_id: str = "r", **named: Any) -> str:
    async def nothing(journal: PostgresJournal) -> None:
        del journal

    with pytest.raises(StoreError) as caught:
        use(PostgresJournal(url, run_id, **named), nothing)
    text = str(caught.value)
    password = sa.make_url(url).password
    assert password is None or str(password) not in text
    return text


def changed(url: str, **fields: Any) -> str:
    return sa.make_url(url).set(**fields).render_as_string(hide_password=False)


def test_errors_say_where_and_what_to_do(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres, "OPEN_SECONDS", 0.5)
    at = sa.make_url(postgres_url)
    text = refused(changed(postgres_url, database="nowhere"))
    assert f"{at.host}:{at.port}, database 'nowhere'" in text
    assert "CREATE DATABASE nowhere" in text
    text = refused(changed(postgres_url, host="127.0.0.1", port=1))
    assert "127.0.0.1:1," in text
    assert "start the server, or check host and port" in text
    assert "check the host" in refused(changed(postgres_url, host="no.such.host.invalid"))


def test_wrong_password_and_missing_rights(postgres_url: str, schema_url: str) -> None:
    name, password = f"u{secrets.token_hex(4)}", secrets.token_hex(8)
    schema = schema_url.rpartition("%3D")[2]
    sql(postgres_url, f"CREATE ROLE {name} LOGIN PASSWORD '{password}'")
    try:
        text = refused(changed(schema_url, username=name, password=password))
        assert "GRANT CREATE, USAGE ON SCHEMA" in text
        sql(postgres_url, f"GRANT USAGE ON SCHEMA {schema} TO {name}")
        text = refused(changed(schema_url, username=name, password=password))
        assert f"permission denied for schema {schema}" in text
        assert "GRANT CREATE, USAGE ON SCHEMA" in text
        rules = "SELECT auth_method FROM pg_hba_file_rules WHERE type = 'host'"
        if sql(postgres_url, rules)[0][0] in (
            "md5",
            "scram-sha-256",
        ):  # a server may trust everybody
            text = refused(changed(postgres_url, username=name, password="wrong-secret"))
            assert "check user and password in store.url" in text
    finally:
        sql(postgres_url, f"REVOKE ALL ON SCHEMA {schema} FROM {name}")
        sql(postgres_url, f"DROP ROLE {name}")


def test_a_pool_that_is_too_small_names_its_settings(postgres_url: str, run_id: str) -> None:
    pool = PoolSettings(size=1, max_overflow=0, timeout=0.2)

    async def work(journal: PostgresJournal) -> None:
        await journal.write([rollout(f"ro{i}") for i in range(2000)], [])
        _, engine = journal._engines()
        async with engine.connect():
            with pytest.raises(StoreError, match=r"QueuePool limit.*raise DB_POOL_SIZE"):
                await journal.rows("rollout", ["ro1"])
        assert len(await journal.rows("rollout", ["ro1"])) == 1

    use(PostgresJournal(postgres_url, run_id, pool), work)


# Tables.


def test_two_runs_that_start_at_once_make_the_tables_once(schema_url: str) -> None:
    async def main() -> None:
        journals = [PostgresJournal(schema_url, f"run{i}") for i in range(4)]
        await asyncio.gather(*(journal.open() for journal in journals))
        await asyncio.gather(*(journal.write([rollout("a")], []) for journal in journals))
        await asyncio.gather(*(journal.close() for journal in journals))

    asyncio.run(main())
    assert sql(schema_url, f"SELECT version_num FROM {VERSION_TABLE}") == [("0001",)]


def test_the_migrations_make_the_tables_that_the_statements_name(schema_url: str) -> None:
    async def nothing(journal: PostgresJournal) -> None:
        del journal

    use(PostgresJournal(schema_url, "r"), nothing)
    engine = sa.create_engine(sa.make_url(schema_url).set(drivername="postgresql+psycopg"))
    with engine.connect() as connection:
        found = sa.inspect(connection)
        for table in metadata.sorted_tables:
            columns = {one["name"]: one for one in found.get_columns(table.name)}
            assert list(columns) == [column.name for column in table.c], table.name
            for column in table.c:
                there = columns[column.name]
                assert there["nullable"] == column.nullable, (table.name, column.name)
                assert there["type"].python_type is plain(column.type).python_type
            keys = found.get_pk_constraint(table.name)["constrained_columns"]
            assert keys == [column.name for column in table.primary_key]
    engine.dispose()


def plain(kept: Any) -> Any:
    return kept.impl_instance if isinstance(kept, Exact) else kept


def test_tables_of_a_newer_version_are_refused(schema_url: str) -> None:
    async def nothing(journal: PostgresJournal) -> None:
        del journal

    use(PostgresJournal(schema_url, "r"), nothing)
    sql(schema_url, f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    assert "version 9999, this agl_ray knows versions up to 0001" in refused(schema_url)
    sql(schema_url, f"UPDATE {VERSION_TABLE} SET version_num = '0001'")
    sql(schema_url, "UPDATE agl_ray_owner SET span_schema = 'another'")
    assert "span_schema is another" in refused(schema_url)
