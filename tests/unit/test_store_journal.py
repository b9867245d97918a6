"""Journals: what is written is read back, groups commit together, damage is a StoreError that says what to do."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from agl_ray.store import sqlite
from agl_ray.store.journal import GroupCommit, Row, SpanRow, open_journal
from agl_ray.store.memory import MemoryJournal
from agl_ray.store.sqlite import SqliteJournal
from agl_ray.types import ConfigError, Rollout, StoreError, to_json


def rollout_row(name: str, position: int = 1) -> Row:
    body = to_json(Rollout(rollout_id=name, input={"x": 1}, start_time=1.0))
    return Row("rollout", name, position, body)


def span_row(batch: str, first: int, number: int = 1) -> SpanRow:
    return SpanRow(batch, ("ro", "at"), first, number, batch.encode() * 100)


def test_sqlite_reads_back_what_was_written(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "deep" / "store.db")
    assert journal.load().rollouts == []
    journal.write([rollout_row("b", 2), rollout_row("a", 1), Row("state", "k", 0, b"\0\1")], [])
    journal.write([rollout_row("b", 3)], [span_row("s2", 3, 2), span_row("s1", 1, 2)])
    assert [row.first for row in journal.payloads([("ro", "at"), ("ro", "no")])] == [1, 3]
    assert journal.find_batch(("ro", "at"), "s2") == (3, 2)
    assert journal.find_batch(("ro", "no"), "s2") is None
    journal.close()
    again = SqliteJournal(tmp_path / "deep" / "store.db")
    snapshot = again.load()
    assert [(place, one.rollout_id) for place, one in snapshot.rollouts] == [(3, "b"), (1, "a")]
    assert snapshot.values == {"k": b"\0\1"}
    assert snapshot.spans == [(("ro", "at"), 4, 4, 400)]
    assert snapshot.starts == 2
    again.close()


def test_a_failed_transaction_leaves_nothing(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "store.db")
    journal.load()
    with pytest.raises(StoreError):
        journal.write([rollout_row("a")], [span_row("s", 1), span_row("s", 2)])
    assert journal.payloads([("ro", "at")]) == []
    journal.close()
    assert SqliteJournal(tmp_path / "store.db").load().rollouts == []


def test_memory_says_that_nothing_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        open_journal("memory://").load()
    assert "NOTHING IS KEPT" in caplog.text


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///", "postgres://x", "store.db", ""])
def test_unknown_urls_are_configuration_errors(url: str) -> None:
    with pytest.raises(ConfigError, match="sqlite:///path"):
        open_journal(url)


def test_url_paths() -> None:
    relative, absolute = open_journal("sqlite:///runs/x.db"), open_journal("sqlite:////tmp/x.db")
    assert isinstance(relative, SqliteJournal)
    assert isinstance(absolute, SqliteJournal)
    assert str(relative.path) == "runs/x.db"
    assert str(absolute.path) == "/tmp/x.db"


def written(path: Path) -> Path:
    """A journal with a few hundred records, closed."""
    journal = SqliteJournal(path)
    journal.load()
    journal.write(
        [rollout_row(f"ro-{i}", i) for i in range(300)],
        [span_row(f"s{i}", i + 1) for i in range(300)],
    )
    journal.close()
    return path


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_not_a_database(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    path.write_text("this is a letter, not a database\n" * 100)
    with pytest.raises(StoreError, match="not a SQLite file"):
        SqliteJournal(path).load()


def test_damaged_pages(tmp_path: Path) -> None:
    path = written(tmp_path / "store.db")
    overwrite(path, 4096, b"\xff" * (path.stat().st_size - 8192))
    with pytest.raises(StoreError, match="damaged"):
        SqliteJournal(path).load()


def test_truncated_file(tmp_path: Path) -> None:
    path = written(tmp_path / "store.db")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(StoreError, match="damaged"):
        SqliteJournal(path).load()


def test_damaged_record_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "store.db")
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE rollout SET body = '{\"rollout_id\": 7}' WHERE key = 'ro-5'")
    connection.close()
    with pytest.raises(StoreError, match=r"'ro-5' of table 'rollout'.*damaged"):
        SqliteJournal(path).load()


def test_a_flipped_bit_in_a_payload_is_noticed(tmp_path: Path) -> None:
    path = written(tmp_path / "store.db")
    content = path.read_bytes()
    overwrite(path, content.index(b"s7" * 100) + 3, b"!")
    journal = SqliteJournal(path)
    journal.load()
    with pytest.raises(StoreError, match=r"spans 8 to 8 of rollout ro are damaged"):
        journal.payloads([("ro", "at")])
    journal.close()


def test_another_schema_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "store.db")
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE meta SET value = '99' WHERE key = 'schema_version'")
    connection.close()
    with pytest.raises(StoreError, match="schema_version is 99"):
        SqliteJournal(path).load()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="writable"):
        SqliteJournal(tmp_path / "file" / "store.db").load()


def test_a_file_that_vanished_before_a_restart(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="gone now"):
        SqliteJournal(tmp_path / "store.db", must_exist=True).load()
    assert not (tmp_path / "store.db").exists()


def test_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "LOCK_SECONDS", 0.1)
    script = (
        "import sys; from agl_ray.store.sqlite import SqliteJournal; "
        "SqliteJournal(sys.argv[1]).load(); print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "store.db")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"open\n"
        with pytest.raises(StoreError, match="another store process"):
            SqliteJournal(tmp_path / "store.db").load()
        owner.kill()
        owner.wait()
        SqliteJournal(tmp_path / "store.db").load()


class SlowJournal(MemoryJournal):
    """Writes when told to; notes each transaction."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Semaphore(0)
        self.transactions: list[list[str]] = []
        self.error: Exception | None = None

    def write(self, rows, spans) -> None:
        self.go.acquire(timeout=30)
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
