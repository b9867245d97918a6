"""The default journal: one SQLite file in WAL mode, synchronous=FULL.

What it is: a table per kind of record (`key`, `position`, JSON `body`) and a table of span payloads. A transaction is on disk
before its callers are answered. One process at a time owns the file (a lock beside it, freed by the kernel when the
process dies). Failures are StoreErrors that name the file and say what to do.
Who calls it: `agl_ray.store.journal.open_journal`. Test alone: tests/unit/test_store_journal.py.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from agl_ray.store.journal import Row, SpanRow
from agl_ray.store.payload import SCHEMA_PRINT
from agl_ray.store.state import AttemptKey, BatchEntry, Snapshot, SpanTotals
from agl_ray.types import Attempt, ResourcesUpdate, Rollout, StoreError, Worker

log = logging.getLogger("agl_ray.store")

SCHEMA_VERSION = "1"
LOCK_SECONDS = 10.0  # a killed store's successor may start before the kernel has buried it
KINDS = ("rollout", "attempt", "resources", "worker", "state")

_TABLES = [
    "CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    *(
        f"CREATE TABLE IF NOT EXISTS {kind} (key TEXT PRIMARY KEY, position INTEGER NOT NULL, body BLOB NOT NULL)"
        for kind in KINDS
    ),
    "CREATE TABLE IF NOT EXISTS spans (rollout_id TEXT NOT NULL, attempt_id TEXT NOT NULL, batch_id TEXT NOT NULL, "
    "first INTEGER NOT NULL, count INTEGER NOT NULL, size INTEGER NOT NULL, crc INTEGER NOT NULL, payload BLOB NOT NULL, "
    "PRIMARY KEY (rollout_id, attempt_id, batch_id))",
    # Starting up reads this index alone, not the payloads.
    "CREATE UNIQUE INDEX IF NOT EXISTS span_order ON spans (rollout_id, first, attempt_id, count, size)",
]
_UPSERT = {
    kind: f"INSERT INTO {kind} VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET "
    "position = excluded.position, body = excluded.body"
    for kind in KINDS
}


class SqliteJournal:
    """`path` is made, with its folder, where it does not exist; `must_exist` refuses that (a restart expects its data)."""

    durable = True

    def __init__(self, path: str | Path, *, must_exist: bool = False) -> None:
        self.path = Path(path)
        self.must_exist = must_exist
        self._lock_file: int | None = None
        self._writer: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        self._reading = threading.Lock()

    def load(self) -> Snapshot:
        """Open (or make) the file, take its lock, read every record."""
        with self._explained("open"):
            if self.must_exist and not self.path.exists():
                raise StoreError(
                    f"store journal {self.path}: it was there before the store restarted and is gone now; bring the file "
                    "back, or start a new run"
                )
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self._writer = self._connect()
            starts = self._prepare(self._writer)
            self._reader = self._connect()
            return self._read_all(self._reader, starts)

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
        for statement in _TABLES:
            connection.execute(statement)
        meta = dict(connection.execute("SELECT key, value FROM meta").fetchall())
        expected = {"schema_version": SCHEMA_VERSION, "span_schema": SCHEMA_PRINT}
        for key, value in expected.items():
            if meta.get(key, value) != value:
                connection.execute("ROLLBACK")
                raise StoreError(
                    f"store journal {self.path}: {key} is {meta[key]}, this agl_ray writes {value}; resume the run with "
                    "the agl_ray that wrote it"
                )
        starts = int(meta.get("starts", 0)) + 1
        rows = [*expected.items(), ("starts", str(starts))]
        connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", rows)
        connection.execute("COMMIT")
        return starts

    def _read_all(self, connection: sqlite3.Connection, starts: int) -> Snapshot:
        rollouts = list(_decoded(connection, "rollout", Rollout))
        attempts = [record for _, record in _decoded(connection, "attempt", Attempt)]
        keys = {(one.rollout_id, one.attempt_id) for one in attempts if not one.status.final}
        spans = connection.execute(
            "SELECT rollout_id, attempt_id, SUM(count), MAX(first + count - 1), SUM(size) FROM spans "
            "GROUP BY rollout_id, attempt_id"
        )
        return Snapshot(
            rollouts=rollouts,
            attempts=attempts,
            resources=list(_decoded(connection, "resources", ResourcesUpdate)),
            workers=[record for _, record in _decoded(connection, "worker", Worker)],
            values={
                key: bytes(body) for key, body in connection.execute("SELECT key, body FROM state")
            },
            spans=[SpanTotals((row[0], row[1]), *row[2:]) for row in spans],
            batches=[
                (batch_id, key, BatchEntry(first, count))
                for key in keys
                for batch_id, first, count in connection.execute(
                    "SELECT batch_id, first, count FROM spans WHERE rollout_id = ? AND attempt_id = ?",
                    key,
                )
            ],
            starts=starts,
        )

    def write(self, rows: Sequence[Row], spans: Sequence[SpanRow]) -> None:
        connection = self._opened(self._writer)
        with self._explained("write"):
            connection.execute("BEGIN IMMEDIATE")
            try:
                for kind in KINDS:
                    same = [(row.key, row.position, row.body) for row in rows if row.kind == kind]
                    if same:
                        connection.executemany(_UPSERT[kind], same)
                connection.executemany(
                    "INSERT INTO spans VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    [
                        (
                            *one.key,
                            one.batch_id,
                            one.first,
                            one.number,
                            len(one.payload),
                            zlib.crc32(one.payload),
                            one.payload,
                        )
                        for one in spans
                    ],
                )
                connection.execute("COMMIT")
            except sqlite3.Error:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def payloads(self, keys: Sequence[AttemptKey]) -> list[SpanRow]:
        connection = self._opened(self._reader)
        with self._reading, self._explained("read"):
            return [
                self._intact(SpanRow(batch_id, key, first, number, payload), crc)
                for key in keys
                for batch_id, first, number, crc, payload in connection.execute(
                    "SELECT batch_id, first, count, crc, payload FROM spans "
                    "WHERE rollout_id = ? AND attempt_id = ? ORDER BY first",
                    key,
                )
            ]

    def _intact(self, row: SpanRow, crc: int) -> SpanRow:
        """SQLite does not notice a flipped bit in a payload; a learner would train on it."""
        if zlib.crc32(row.payload) != crc:
            raise StoreError(
                f"store journal {self.path}: the spans {row.first} to {row.first + row.number - 1} of rollout {row.key[0]} "
                "are damaged on disk (checksum); restore the file from a copy, or start a new run"
            )
        return row

    def find_batch(self, key: AttemptKey, batch_id: str) -> BatchEntry | None:
        connection = self._opened(self._reader)
        with self._reading, self._explained("read"):
            row = connection.execute(
                "SELECT first, count FROM spans WHERE rollout_id = ? AND attempt_id = ? AND batch_id = ?",
                (*key, batch_id),
            ).fetchone()
        return None if row is None else BatchEntry(*row)

    def close(self) -> None:
        """Fold the WAL into the file and give the lock back. Also fit for a journal that failed half-way."""
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

    def _opened(self, connection: sqlite3.Connection | None) -> sqlite3.Connection:
        if connection is None:
            raise StoreError(f"store journal {self.path}: it is closed")
        return connection

    @contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise StoreError(
                f"store journal {self.path}: cannot {doing} it: {explain(error)}"
            ) from error


def explain(error: Exception) -> str:
    """What is wrong with the file and what to do, in one sentence."""
    text = str(error)
    if "not a database" in text:
        advice = "this is not a SQLite file; point store.url at a store.db, or at a path that does not exist yet"
    elif "malformed" in text or isinstance(error, (msgspec.MsgspecError, UnicodeDecodeError)):
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


def _decoded(
    connection: sqlite3.Connection, table: str, kind: type[Any]
) -> Iterator[tuple[int, Any]]:
    decoder = msgspec.json.Decoder(kind)
    order = "rowid" if table == "rollout" else "position"  # by creation; by sequence; latest last
    for key, position, body in connection.execute(
        f"SELECT key, position, body FROM {table} ORDER BY {order}"
    ):
        try:
            yield position, decoder.decode(body)
        except msgspec.MsgspecError as error:
            raise msgspec.ValidationError(f"record {key!r} of table {table!r}: {error}") from error
