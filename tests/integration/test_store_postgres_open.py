"""Opening a PostgreSQL journal: addresses, rights, pools and tables that are right, wrong, or of another version."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from journal_contract import rollout

from agl_ray.store.journals import postgres
from agl_ray.store.journals.postgres import PostgresJournal
from agl_ray.store.journals.postgres_schema import VERSION_TABLE, Exact, metadata
from agl_ray.store.journals.settings import PoolSettings
from agl_ray.types import StoreError

pytest_plugins = ["services"]


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


@pytest.fixture
def schema_url(postgres_url: str) -> Iterator[str]:
    """The database seen through a schema of the test's own, with no table in it."""
    name = f"s{secrets.token_hex(6)}"
    sql(postgres_url, f"CREATE SCHEMA {name}")
    yield f"{postgres_url}?options=-c%20search_path%3D{name}"
    sql(postgres_url, f"DROP SCHEMA {name} CASCADE")


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
