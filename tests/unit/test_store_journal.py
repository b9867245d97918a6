"""Journals: the file is what was written, groups commit together, damage is a StoreError that says what to do."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from agl_ray.store.journals import opening, sqlite
from agl_ray.store.journals.base import Condition, Live, Query, Row, SpanRow
from agl_ray.store.journals.group_commit import GroupCommit
from agl_ray.store.journals.memory import MemoryJournal
from agl_ray.store.journals.opening import open_journal
from agl_ray.store.journals.settings import JournalSettings
from agl_ray.store.journals.sqlite import SqliteJournal
from agl_ray.store.rows import row_of
from agl_ray.types import ConfigError, Rollout, StoreError


def rollout_row(name: str, position: int = 1) -> Row:
    record = Rollout(rollout_id=name, input={"x": 1}, start_time=1.0)
    return row_of("rollout", name, position, record, position)


def span_row(batch: str, first: int, number: int = 1) -> SpanRow:
    return SpanRow(batch, ("ro", "at"), first, number, batch.encode() * 100)


def use(path: Path, work: Callable[[SqliteJournal], Awaitable[Any]]) -> Any:
    """`work` on the opened journal at `path`, which is closed afterwards."""

    async def main() -> Any:
        journal = SqliteJournal(path)
        try:
            await journal.open()
            return await work(journal)
        finally:
            await journal.close()

    return asyncio.run(main())


def opened(path: Path, *, must_exist: bool = False) -> Live:
    async def main() -> Live:
        journal = SqliteJournal(path)
        try:
            return await journal.open(must_exist=must_exist)
        finally:
            await journal.close()

    return asyncio.run(main())


def test_sqlite_reads_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "store.db"

    async def write(journal: SqliteJournal) -> None:
        value = row_of("state", "k", 0, b"\0\1")
        await journal.write([rollout_row("b", 2), rollout_row("a", 1), value], [])
        await journal.write([rollout_row("b", 3)], [span_row("s2", 3, 2), span_row("s1", 1, 2)])
        found = await journal.payloads([("ro", "at"), ("ro", "no")])
        assert [row.first for row in found] == [1, 3]
        assert await journal.find_batch(("ro", "at"), "s2") == (3, 2)
        assert await journal.find_batch(("ro", "no"), "s2") is None

    use(path, write)
    live = opened(path)
    assert live.waiting == [("a", 1), ("b", 3)]
    assert (live.num_spans, live.span_bytes, live.starts) == (4, 400, 2)
    assert (live.last_created, live.last_position) == (2, 3)

    async def read(journal: SqliteJournal) -> None:
        assert await journal.rows("state", ["k", "l"]) == [Row("state", "k", 0, (), b"\0\1")]
        assert await journal.span_totals(["ro"]) == [(("ro", "at"), 4, 4, 400)]

    use(path, read)


def test_a_failed_transaction_leaves_nothing(tmp_path: Path) -> None:
    async def work(journal: SqliteJournal) -> None:
        with pytest.raises(StoreError):
            await journal.write([rollout_row("a")], [span_row("s", 1), span_row("s", 2)])
        assert await journal.payloads([("ro", "at")]) == []

    use(tmp_path / "store.db", work)
    assert opened(tmp_path / "store.db").rollouts_by_status == {}


def test_a_page_costs_the_same_wherever_it_begins(tmp_path: Path) -> None:
    """No page of any sorting scans the table or sorts it."""
    places: dict[str, Any] = {"key": "k", "created": 7, "start_time": 1.0, "end_time": 2.0}

    async def work(journal: SqliteJournal) -> None:
        assert journal._reader is not None
        for field, value in places.items():
            for descending in (False, True):
                query = Query("rollout", order_by=field, descending=descending, after=(value, "k"))
                text, values = next(sqlite.sql.selects(query))
                explain = f"EXPLAIN QUERY PLAN {text} LIMIT 5"
                plan = journal._reader.execute(explain, values).fetchall()
                assert [row[3].split()[0] for row in plan] == ["SEARCH"], (text, plan)

    use(tmp_path / "store.db", work)


def test_many_values_are_one_parameter(tmp_path: Path) -> None:
    async def work(journal: SqliteJournal) -> None:
        names = [f"ro-{i}" for i in range(40_000)]
        await journal.write([rollout_row("ro-7"), rollout_row("ro-x", 2)], [])
        assert [row.key for row in await journal.rows("rollout", names)] == ["ro-7"]
        page = await journal.query(Query("rollout", must=(Condition("key", tuple(names)),)))
        assert [row.key for row in page.rows] == ["ro-7"]

    use(tmp_path / "store.db", work)


def test_memory_says_that_nothing_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        asyncio.run(open_journal("memory://").open())
    assert "NOTHING IS KEPT" in caplog.text


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///", "mysql://x", "store.db", ""])
def test_unknown_urls_are_configuration_errors(url: str) -> None:
    with pytest.raises(ConfigError, match="sqlite:///path"):
        open_journal(url)


def test_url_paths() -> None:
    relative, absolute = open_journal("sqlite:///runs/x.db"), open_journal("sqlite:////tmp/x.db")
    assert isinstance(relative, SqliteJournal)
    assert isinstance(absolute, SqliteJournal)
    assert str(relative.path) == "runs/x.db"
    assert str(absolute.path) == "/tmp/x.db"


def test_a_missing_driver_and_missing_keys_are_configuration_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name="sqlalchemy")

    monkeypatch.setattr(opening.importlib, "import_module", missing)
    for url in (
        "postgresql://u@h/d",
        "postgresql+psycopg://u@h/d",
        "mongodb://h",
        "mongodb+srv://h",
    ):
        with pytest.raises(ConfigError, match=r"'sqlalchemy': pip install 'agl-ray\[stores\]'"):
            open_journal(url)
    monkeypatch.undo()
    monkeypatch.delenv("AGL_ENCRYPTION_KEYS", raising=False)
    with pytest.raises(ConfigError, match="AGL_ENCRYPTION_KEYS"):
        opening.encryption_keys(JournalSettings(encryption="aes-gcm").encryption)


def written(path: Path) -> Path:
    """A journal with a few hundred records, closed."""

    async def write(journal: SqliteJournal) -> None:
        await journal.write(
            [rollout_row(f"ro-{i}", i) for i in range(300)],
            [span_row(f"s{i}", i + 1) for i in range(300)],
        )

    use(path, write)
    return path


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_not_a_database(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    path.write_text("this is a letter, not a database\n" * 100)
    with pytest.raises(StoreError, match="not a SQLite file"):
        opened(path)


def test_damaged_pages(tmp_path: Path) -> None:
    path = written(tmp_path / "store.db")
    overwrite(path, 4096, b"\xff" * (path.stat().st_size - 8192))
    with pytest.raises(StoreError, match="damaged"):
        opened(path)


def test_truncated_file(tmp_path: Path) -> None:
    path = written(tmp_path / "store.db")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(StoreError, match="damaged"):
        opened(path)


def test_a_flipped_bit_in_a_payload_is_noticed(tmp_path: Path) -> None:
    path = written(tmp_path / "store.db")
    content = path.read_bytes()
    overwrite(path, content.index(b"s7" * 100) + 3, b"!")

    async def read(journal: SqliteJournal) -> None:
        with pytest.raises(StoreError, match=r"spans 8 to 8 of rollout ro are damaged"):
            await journal.payloads([("ro", "at")])

    use(path, read)


def test_another_schema_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "store.db")
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE meta SET body = CAST('99' AS BLOB) WHERE key = 'schema_version'")
    connection.close()
    with pytest.raises(StoreError, match="schema_version is 99"):
        opened(path)


def test_a_file_of_the_first_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        connection.execute("INSERT INTO meta VALUES ('schema_version', '1')")
    connection.close()
    with pytest.raises(StoreError, match="schema_version is 1, this agl_ray writes 2"):
        opened(path)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="writable"):
        opened(tmp_path / "file" / "store.db")


def test_a_file_that_vanished_before_a_restart(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="gone now"):
        opened(tmp_path / "store.db", must_exist=True)
    assert not (tmp_path / "store.db").exists()


def test_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "LOCK_SECONDS", 0.1)
    script = (
        "import asyncio, sys; from agl_ray.store.journals.sqlite import SqliteJournal; "
        "journal = SqliteJournal(sys.argv[1]); asyncio.run(journal.open()); print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "store.db")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"open\n"
        with pytest.raises(StoreError, match="another store process"):
            opened(tmp_path / "store.db")
        owner.kill()
        owner.wait()
        opened(tmp_path / "store.db")


class SlowJournal(MemoryJournal):
    """Writes when told to; notes each transaction."""

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Semaphore(0)
        self.transactions: list[list[str]] = []
        self.error: Exception | None = None

    async def write(self, rows, spans, events=()) -> None:
        await self.go.acquire()
        if self.error is not None:
            raise self.error
        self.transactions.append([row.key for row in rows])


def test_group_commit_acknowledges_all_waiting_callers_at_once() -> None:
    async def main() -> None:
        journal = SlowJournal()
        group = GroupCommit(journal, asyncio.get_running_loop(), lambda error: None)
        first = group.submit([rollout_row("a")], [])
        await asyncio.sleep(0)
        rest = [group.submit([rollout_row(name)], []) for name in "bcdb"]
        assert len(set(rest)) == 1
        assert rest[0] is not first
        assert group.pending() is rest[0]
        journal.go.release()
        await first
        assert not rest[0].done()
        journal.go.release()
        await rest[0]
        assert journal.transactions == [["a"], ["b", "c", "d"]]
        assert group.pending() is None
        await group.close()

    asyncio.run(main())


@pytest.mark.parametrize("error", [StoreError("disk full"), ValueError("a bug")])
def test_a_failed_group_fails_everybody_after_it(error: Exception) -> None:
    async def main() -> None:
        journal, failures = SlowJournal(), []
        journal.error = error
        group = GroupCommit(journal, asyncio.get_running_loop(), failures.append)
        first = group.submit([rollout_row("a")], [])
        await asyncio.sleep(0)
        second = group.submit([rollout_row("b")], [])
        journal.go.release()
        for future in (first, second):
            with pytest.raises(StoreError, match=str(error)):
                await future
        with pytest.raises(StoreError):
            group.submit([], [])
        assert len(failures) == 1
        assert journal.transactions == []
        await group.close()

    asyncio.run(main())
