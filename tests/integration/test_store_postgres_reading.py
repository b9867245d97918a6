"""`agl-ray store ls`, `show` and `export` of a run that lives in PostgreSQL: beside its store, of one moment, changing nothing."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from agl_ray.cli import main
from agl_ray.ops.encryption import KEYS_VARIABLE, FieldCipher
from agl_ray.spans import span_batch
from agl_ray.store import LightningStore, StoreCore
from agl_ray.store.archive import Archive, open_archive
from agl_ray.store.journals.postgres_reading import PostgresReading
from agl_ray.store.journals.settings import JournalSettings
from agl_ray.types import EndReason, StoreError

pytest_plugins = ["services"]


def span(key: tuple[str, str], name: str) -> Any:
    row = {"rollout_id": key[0], "attempt_id": key[1], "span_id": name, "name": name}
    row |= {"kind": "span", "start_ns": 1, "end_ns": 2, "status": "OK"}
    return span_batch([row])


async def rollout_ids(opened: Archive) -> list[str]:
    return [one.rollout.rollout_id async for page in opened.rollouts() for one in page]


def rows_of(url: str, run_id: str) -> dict[str, Any]:
    """Everything of the run that is in the database, by table."""
    import psycopg

    with psycopg.connect(url) as connection:
        tables = connection.execute(
            "SELECT table_name FROM information_schema.columns WHERE column_name = 'run_id' AND table_name LIKE 'agl_ray_%'"
        ).fetchall()
        found = {}
        for (table,) in tables:
            rows = connection.execute(
                f'SELECT * FROM "{table}" WHERE run_id = %s', [run_id]
            ).fetchall()
            found[table] = sorted(map(str, rows))
        return found


@pytest.mark.parametrize("how", ["plain", "both"])
def test_a_living_run_is_read_as_it_was_at_one_moment(
    postgres_url: str, run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """both: encrypted, with payloads outside."""
    monkeypatch.setenv(KEYS_VARIABLE, FieldCipher.new_key())
    more = {"encryption": "aes-gcm", "payload": f"file://{tmp_path}/payloads"}
    settings = JournalSettings(run_id=run_id, **(more if how == "both" else {}))
    long = "b" * 50_000  # large enough to rest outside

    async def scenario() -> None:
        core = await StoreCore.open(postgres_url, settings=settings)
        store = LightningStore.local(core)
        first = await store.start_rollout({"i": 0})
        key = (first.rollout_id, first.attempt_id)
        await store.add_spans(*key, span(key, long))
        before = await asyncio.to_thread(rows_of, postgres_url, run_id)
        async with open_archive(postgres_url, settings) as opened:
            assert opened.alive
            assert await asyncio.to_thread(rows_of, postgres_url, run_id) == before
            await store.enqueue_rollout({"i": 1})
            await store.add_spans(*key, span(key, "late"))
            await store.end_attempt(*key, EndReason.OK, reward=1.0)
            assert await rollout_ids(opened) == [first.rollout_id]
            (attempt,) = await opened.attempts([first.rollout_id])
            assert (attempt.num_spans, attempt.end_reason) == (1, None)
            totals = await opened.span_totals([first.rollout_id])
            (table,) = [one async for one in opened.spans(totals)]
            assert table.column("name").to_pylist() == [long]
        async with open_archive(postgres_url, settings) as opened:
            assert len(await rollout_ids(opened)) == 2
        await core.close()  # the owner never noticed
        before = await asyncio.to_thread(rows_of, postgres_url, run_id)
        async with open_archive(postgres_url, settings) as opened:
            assert not opened.alive
            assert len(await rollout_ids(opened)) == 2
        assert await asyncio.to_thread(rows_of, postgres_url, run_id) == before

    asyncio.run(scenario())


def test_a_reader_writes_nothing_and_names_the_runs_there_are(
    postgres_url: str, run_id: str
) -> None:
    from journal_contract import rollout

    async def scenario() -> None:
        settings = JournalSettings(run_id=run_id)
        core = await StoreCore.open(postgres_url, settings=settings)
        reader = PostgresReading(postgres_url, run_id)
        await reader.open()
        for work in (reader.write([rollout("x")], []), reader.forget(["x"]), reader.drop_events(1)):
            with pytest.raises(StoreError, match="reading alone"):
                await work
        await reader.close()
        with pytest.raises(StoreError, match="closed"):
            await reader.keys("rollout", "")
        other = PostgresReading(postgres_url, f"{run_id}-none")
        with pytest.raises(StoreError, match=f"no such run.*{run_id}.*--run-id"):
            await other.open()
        await other.close()
        await core.close()

    asyncio.run(scenario())


def test_a_broken_connection_ends_a_reader(postgres_url: str, run_id: str) -> None:
    """Another connection would answer of another moment."""
    import psycopg

    async def scenario() -> None:
        core = await StoreCore.open(postgres_url, settings=JournalSettings(run_id=run_id))
        reader = PostgresReading(postgres_url, run_id)
        await reader.open()

        async def pid(connection: Any) -> int:
            raw = await connection.get_raw_connection()
            return int(raw.driver_connection.info.backend_pid)

        backend = await reader._read("look", pid)
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            connection.execute("SELECT pg_terminate_backend(%s)", [backend])
        with pytest.raises(StoreError, match="cannot read"):
            await reader.keys("rollout", "")
        await reader.close()
        await core.close()

    asyncio.run(scenario())


def test_the_command_line_looks_at_a_living_run(
    postgres_url: str, run_id: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = asyncio.new_event_loop()
    settings = JournalSettings(run_id=run_id)
    core = loop.run_until_complete(StoreCore.open(postgres_url, settings=settings))
    store = LightningStore.local(core)
    made = loop.run_until_complete(store.start_rollout({"q": 1}))
    key = (made.rollout_id, made.attempt_id)
    loop.run_until_complete(store.add_spans(*key, span(key, "seen")))
    there = [postgres_url, "--run-id", run_id]

    def said(*words: str) -> str:
        assert main(["store", *words]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    assert "its run is alive" in said("ls", *there)
    (row,) = json.loads(said("ls", *there, "--json"))
    assert row["rollout_id"] == made.rollout_id
    assert "seen" in said("show", made.rollout_id, "--run", *there)
    said("export", *there, "--out", str(tmp_path / "out"))
    assert pq.read_table(tmp_path / "out" / "spans.parquet")["name"].to_pylist() == ["seen"]
    loop.run_until_complete(store.end_attempt(*key, EndReason.OK, reward=1.0))
    loop.run_until_complete(core.close())
    loop.close()
    assert "alive" not in said("ls", *there)


def test_an_encrypted_run_gets_another_key(
    postgres_url: str,
    run_id: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    old, new = FieldCipher.new_key(), FieldCipher.new_key()
    there = [postgres_url, "--run-id", run_id, "--encryption", "fernet"]

    async def fill() -> None:
        settings = JournalSettings(run_id=run_id, encryption="fernet")
        core = await StoreCore.open(postgres_url, settings=settings)
        await LightningStore.local(core).enqueue_rollout({"secret": 42})
        await core.close()

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv(KEYS_VARIABLE, old)
    asyncio.run(fill())
    for keys, verb, code in ((f"{new},{old}", "rotate", 0), (old, "ls", 2), (new, "ls", 0)):
        monkeypatch.setenv(KEYS_VARIABLE, keys)
        assert main(["store", verb, *there]) == code, capsys.readouterr()
    assert "secret" in capsys.readouterr().out


def test_a_database_without_a_store_is_said(postgres_url: str) -> None:
    import psycopg

    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS agl_empty")
        connection.execute("CREATE DATABASE agl_empty")
    reader = PostgresReading(postgres_url.rpartition("/")[0] + "/agl_empty", "r")

    async def scenario() -> None:
        with pytest.raises(StoreError, match="holds no store"):
            await reader.open()
        await reader.close()

    asyncio.run(scenario())
