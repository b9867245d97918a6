"""A SQLite journal opened beside its owner, for reading alone: what `agl-ray store ls`, `show` and `export` look at while a run lives.

What it is: one connection that refuses to write, inside one read transaction, so that everything it answers is of one moment however
long it takes. It takes no lock, counts no start and waits for nobody; the owner goes on writing meanwhile.
Who calls it: `agl_ray.store.archive`. Test alone: tests/unit/test_store_archive.py.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from agl_ray.store.journals.base import EventRow, Live, Row, SpanRow
from agl_ray.store.journals.sqlite import SqliteJournal
from agl_ray.store.journals.sqlite_read import read_live
from agl_ray.store.journals.sqlite_schema import VERSION
from agl_ray.store.payload import SCHEMA_PRINT
from agl_ray.types import StoreError


class SqliteReading(SqliteJournal):
    """`path` must exist; nothing is made, locked or changed. `alive`: whether a store owned it when this was opened."""

    alive = False

    async def open(self, *, must_exist: bool = False) -> Live:
        del must_exist  # a reader always expects its file
        return await asyncio.get_running_loop().run_in_executor(self._reading, self._look)

    def _look(self) -> Live:
        with self._explained("open"):
            if not self.path.is_file():
                raise StoreError(f"store journal {self.path}: there is no such file")
            self.alive = is_owned(self.path)
            self._reader = self._beside()
            self._reader.execute("BEGIN")  # of one moment, from the first question on
            starts = self._same_schema(self._reader)
            return read_live(self._reader, starts)

    def _beside(self) -> sqlite3.Connection:
        """A connection that shares the file with its owner. Where the folder cannot be written (an archive), SQLite
        cannot share it, and nobody can change it."""
        place = quote(str(self.path.resolve()))
        try:
            connection = self._uri(f"file:{place}?mode=rw")
            connection.execute("SELECT COUNT(*) FROM sqlite_master")
        except sqlite3.OperationalError:
            if _wal_of(self.path).exists():
                raise
            connection = self._uri(f"file:{place}?mode=ro&immutable=1")
        connection.execute("PRAGMA query_only = ON")
        return connection

    @staticmethod
    def _uri(uri: str) -> sqlite3.Connection:
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA busy_timeout = 10000")
        return connection

    def _same_schema(self, connection: sqlite3.Connection) -> int:
        """How often the store was started; StoreError where the file is no store, or another version's."""
        columns = [row[1] for row in connection.execute("PRAGMA table_info(meta)")]
        if not columns:
            raise StoreError(f"store journal {self.path}: this SQLite file holds no store")
        self._check_version(connection)
        rows = connection.execute("SELECT key, body FROM meta").fetchall()
        meta = {key: bytes(body).decode("utf-8", "replace") for key, body in rows}
        for key, value in {"schema_version": VERSION, "span_schema": SCHEMA_PRINT}.items():
            self._check(key, meta.get(key, "unknown"), value)
        return int(meta.get("starts", 0))

    async def write(
        self, rows: Sequence[Row], spans: Sequence[SpanRow], events: Sequence[EventRow] = ()
    ) -> None:
        raise StoreError(f"store journal {self.path}: it was opened for reading alone")


def is_owned(file: Path) -> bool:
    """Whether a living store has this SQLite file (it holds the lock beside it)."""
    try:
        lock = os.open(file.with_name(file.name + "-lock"), os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(lock)


def _wal_of(path: Path) -> Path:
    return path.with_name(path.name + "-wal")
