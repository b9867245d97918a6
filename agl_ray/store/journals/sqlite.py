"""The default journal: one SQLite file in WAL mode, synchronous=FULL.

What it is: a writer and a reader, each a thread with a connection of its own. A transaction is on disk before its callers are
answered. One process at a time owns the file (a lock beside it, freed by the kernel when the process dies). Failures
are StoreErrors that name the file and say what to do.
Who calls it: `journals.opening.open_journal`. Test alone: tests/unit/test_store_journal.py,
tests/unit/test_store_journal_contract.py.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from agl_ray.store.journals import sqlite_query as sql
from agl_ray.store.journals.base import (
    AttemptKey,
    BatchEntry,
    EventRow,
    Live,
    Page,
    Query,
    Row,
    SpanRow,
    SpanTotals,
)
from agl_ray.store.journals.sqlite_log import check_log
from agl_ray.store.journals.sqlite_read import fields, read_live, records
from agl_ray.store.journals.sqlite_schema import TABLES, UPSERT, VERSION
from agl_ray.store.payload import SCHEMA_PRINT
from agl_ray.types import StoreError

log = logging.getLogger("agl_ray.store")
T = TypeVar("T")

LOCK_SECONDS = 10.0  # a killed store's successor may start before the kernel has buried it


class SqliteJournal:
    """`path` is made, with its folder, where it does not exist."""

    durable = True

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock_file: int | None = None
        self._writer: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="store-writer")
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="store-reader")

    # Life.

    async def open(self, *, must_exist: bool = False) -> Live:
        return await asyncio.get_running_loop().run_in_executor(
            self._writing, self._open, must_exist
        )

    def _open(self, must_exist: bool) -> Live:
        with self._explained("open"):
            if must_exist and not self.path.exists():
                raise StoreError(
                    f"store journal {self.path}: it was there before the store restarted and is gone now; bring the file "
                    "back, or start a new run"
                )
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            check_log(self.path)
            self._writer = self._connect()
            starts = self._prepare(self._writer)
            self._reader = self._connect()
            return read_live(self._reader, starts)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA busy_timeout = 10000")
        return connection

    def _take_lock(self) -> None:
        lock_path = self.path.with_name(self.path.name + "-lock")
        self._lock_file = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o644)
        give_up = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() > give_up:
                    raise StoreError(
                        f"store journal {self.path}: another store process has it open; end that run first, or give "
                        "this one another store.url"
                    ) from error
                time.sleep(0.05)

    def _prepare(self, connection: sqlite3.Connection) -> int:
        """Make or check the tables; count this start."""
        connection.execute("BEGIN IMMEDIATE")
        try:
            self._check_version(connection)
            for statement in TABLES:
                connection.execute(statement)
            expected = {"schema_version": VERSION, "span_schema": SCHEMA_PRINT}
            rows = connection.execute("SELECT key, body FROM meta").fetchall()
            meta = {key: bytes(body).decode("utf-8", "replace") for key, body in rows}
            for key, value in expected.items():
                self._check(key, meta.get(key, value), value)
            starts = int(meta.get("starts", 0)) + 1
            told = {**expected, "starts": str(starts)}
            connection.executemany(
                UPSERT["meta"], [(key, 0, value.encode()) for key, value in told.items()]
            )
            connection.execute("COMMIT")
            return starts
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _check_version(self, connection: sqlite3.Connection) -> None:
        """The first schema kept its version in another shape of table."""
        columns = [row[1] for row in connection.execute("PRAGMA table_info(meta)")]
        if "value" in columns:
            read = "SELECT value FROM meta WHERE key = 'schema_version'"
            found = connection.execute(read).fetchone()
            self._check("schema_version", found[0] if found else "unknown", VERSION)

    def _check(self, key: str, found: str, expected: str) -> None:
        if found != expected:
            raise StoreError(
                f"store journal {self.path}: {key} is {found}, this agl_ray writes {expected}; resume the run with the "
                "agl_ray that wrote it"
            )

    async def close(self) -> None:
        """Fold the WAL into the file and give the lock back. Also fit for a journal that failed half-way."""
        await asyncio.get_running_loop().run_in_executor(None, self._close)

    def _close(self) -> None:
        self._reading.shutdown(wait=True)
        self._writing.shutdown(wait=True)
        try:
            for connection in filter(None, (self._reader, self._writer)):
                connection.close()  # the last one folds the WAL in
        except sqlite3.Error as error:  # nothing is lost: the WAL stays beside the file
            log.warning("store journal %s: cannot fold its WAL in: %s", self.path, explain(error))
        finally:
            self._reader = self._writer = None
            if self._lock_file is not None:
                os.close(self._lock_file)
                self._lock_file = None

    # Writing.

    async def write(
        self, rows: Sequence[Row], spans: Sequence[SpanRow], events: Sequence[EventRow] = ()
    ) -> None:
        def work(connection: sqlite3.Connection) -> None:
            for kind, statement in UPSERT.items():
                same = [(*row[1:3], *row.columns, row.body) for row in rows if row.kind == kind]
                if same:
                    connection.executemany(statement, same)
            if spans:
                connection.executemany(
                    "INSERT INTO spans VALUES (?, ?, ?, ?, ?, ?, ?, ?)", map(_span_values, spans)
                )
            if events:
                connection.executemany("INSERT OR REPLACE INTO events VALUES (?, ?)", events)

        await self._write(work)

    async def drop_events(self, up_to: int) -> None:
        await self._write(
            lambda connection: connection.execute("DELETE FROM events WHERE number <= ?", (up_to,))
        )

    async def forget(self, rollout_ids: Sequence[str]) -> None:
        def work(connection: sqlite3.Connection) -> None:
            keys = [(rollout_id,) for rollout_id in rollout_ids]
            connection.executemany("DELETE FROM rollout WHERE key = ?", keys)
            connection.executemany("DELETE FROM attempt WHERE rollout_id = ?", keys)
            connection.executemany("DELETE FROM spans WHERE rollout_id = ?", keys)

        await self._write(work)

    async def _write(self, work: Callable[[sqlite3.Connection], Any]) -> None:
        """`work` as one transaction."""

        def transaction() -> None:
            connection = self._opened(self._writer)
            with self._explained("write"):
                connection.execute("BEGIN IMMEDIATE")
                try:
                    work(connection)
                    connection.execute("COMMIT")
                except BaseException:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                    raise

        await self._in(self._writing, transaction)

    # Reading.

    async def rows(self, kind: str, keys: Sequence[str]) -> list[Row]:
        where, values = sql.among("key", keys)
        return await self._rows(kind, f"SELECT {fields(kind)} FROM {kind} WHERE {where}", values)

    async def attempts_of(self, rollout_ids: Sequence[str]) -> list[Row]:
        where, values = sql.among("rollout_id", rollout_ids)
        text = (
            f"SELECT {fields('attempt')} FROM attempt WHERE {where} ORDER BY rollout_id, position"
        )
        return await self._rows("attempt", text, values)

    async def _rows(self, kind: str, text: str, values: Sequence[Any]) -> list[Row]:
        return await self._read(lambda connection: list(records(connection, kind, text, values)))

    async def span_totals(self, rollout_ids: Sequence[str]) -> list[SpanTotals]:
        where, values = sql.among("rollout_id", rollout_ids)
        text = (
            "SELECT rollout_id, attempt_id, SUM(count), MAX(first + count - 1), SUM(size) FROM spans "
            f"WHERE {where} GROUP BY rollout_id, attempt_id"
        )
        return await self._read(
            lambda connection: [
                SpanTotals((row[0], row[1]), *row[2:]) for row in connection.execute(text, values)
            ]
        )

    async def query(self, query: Query) -> Page:
        def work(connection: sqlite3.Connection) -> Page:
            total = connection.execute(*sql.counting(query)).fetchone()[0] if query.count else None
            return Page(list(_answers(connection, query)), total)

        return await self._read(work)

    async def keys(self, kind: str, prefix: str) -> list[str]:
        text = f"SELECT key FROM {kind} WHERE key >= ? AND key < ? ORDER BY key"
        values = (prefix, prefix + "\U0010ffff")  # no text sorts behind that code point
        return await self._read(
            lambda connection: [key for (key,) in connection.execute(text, values)]
        )

    async def payloads(self, keys: Sequence[AttemptKey]) -> list[SpanRow]:
        text = (
            "SELECT batch_id, first, count, crc, payload FROM spans "
            "WHERE rollout_id = ? AND attempt_id = ? ORDER BY first"
        )
        return await self._read(
            lambda connection: [
                self._intact(SpanRow(batch_id, key, first, number, payload), crc)
                for key in keys
                for batch_id, first, number, crc, payload in connection.execute(text, key)
            ]
        )

    def _intact(self, row: SpanRow, crc: int) -> SpanRow:
        """SQLite does not notice a flipped bit in a payload; a learner would train on it."""
        if zlib.crc32(row.payload) != crc:
            raise StoreError(
                f"store journal {self.path}: the spans {row.first} to {row.first + row.number - 1} of rollout {row.key[0]} "
                "are damaged on disk (checksum); restore the file from a copy, or start a new run"
            )
        return row

    async def find_batch(self, key: AttemptKey, batch_id: str) -> BatchEntry | None:
        text = "SELECT first, count FROM spans WHERE rollout_id = ? AND attempt_id = ? AND batch_id = ?"
        row = await self._read(
            lambda connection: connection.execute(text, (*key, batch_id)).fetchone()
        )
        return None if row is None else BatchEntry(*row)

    async def events(self, after: int, limit: int) -> list[EventRow]:
        text = "SELECT number, body FROM events WHERE number > ? ORDER BY number LIMIT ?"
        return await self._read(
            lambda connection: [EventRow(*row) for row in connection.execute(text, (after, limit))]
        )

    async def _read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        def reading() -> T:
            connection = self._opened(self._reader)
            with self._explained("read"):
                return work(connection)

        return await self._in(self._reading, reading)

    async def _in(self, thread: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        try:
            future = asyncio.get_running_loop().run_in_executor(thread, work)
        except RuntimeError as error:  # the thread was ended
            raise StoreError(f"store journal {self.path}: it is closed") from error
        return await future

    def _opened(self, connection: sqlite3.Connection | None) -> sqlite3.Connection:
        if connection is None:
            raise StoreError(f"store journal {self.path}: it is closed")
        return connection

    @contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
            raise StoreError(
                f"store journal {self.path}: cannot {doing} it: {explain(error)}"
            ) from error


def explain(error: Exception) -> str:
    """What is wrong with the file and what to do, in one sentence."""
    text = str(error)
    if "not a database" in text:
        advice = "this is not a SQLite file; point store.url at a store.db, or at a path that does not exist yet"
    elif "malformed" in text or isinstance(error, UnicodeDecodeError):
        advice = "the file is damaged; restore it from a copy, or start a new run"
    elif "full" in text or getattr(error, "errno", None) == 28:
        advice = "the disk is full; free some space and resume the run"
    elif "readonly" in text or "unable to open" in text or isinstance(error, OSError):
        advice = "check that the folder exists and is writable"
    elif "locked" in text:
        advice = "another process is writing to it; end that first"
    else:
        advice = "check the disk"
    return f"{text} ({advice})"


def _answers(connection: sqlite3.Connection, query: Query) -> Iterator[Row]:
    """The statements of a query one after the other, until its limit."""
    skip, left = query.offset, query.limit
    for text, values in sql.selects(query):
        if left == 0:
            return
        for row in records(
            connection, query.kind, f"{text} LIMIT ? OFFSET ?", [*values, left, skip]
        ):
            left -= 1
            yield row
        if (
            skip
        ):  # paging by number after a place is rare: the second range is then counted off by hand
            number = connection.execute(f"SELECT COUNT(*) FROM ({text})", values).fetchone()[0]
            skip = max(0, skip - number)


def _span_values(one: SpanRow) -> tuple[Any, ...]:
    place = (*one.key, one.batch_id, one.first, one.number)
    return (*place, len(one.payload), zlib.crc32(one.payload), one.payload)
