"""Tables and indexes of the SQLite journal: a table per kind of record, its columns real ones, and one of span payloads.

Who calls it: `journals.sqlite`. Test alone: tests/unit/test_store_journal.py.
"""

from __future__ import annotations

from agl_ray.store.journals.base import COLUMNS, FIXED

VERSION = "2"

_TYPES = {str: "TEXT", int: "INTEGER", float: "REAL"}


def _table(kind: str) -> str:
    columns = [f"{name} {_TYPES[of]}" for name, of in COLUMNS[kind].items()]
    places = ["key TEXT PRIMARY KEY", "position INTEGER NOT NULL", *columns, "body BLOB NOT NULL"]
    return f"CREATE TABLE IF NOT EXISTS {kind} ({', '.join(places)})"


TABLES = [
    *(_table(kind) for kind in COLUMNS),
    "CREATE TABLE IF NOT EXISTS spans (rollout_id TEXT NOT NULL, attempt_id TEXT NOT NULL, batch_id TEXT NOT NULL, "
    "first INTEGER NOT NULL, count INTEGER NOT NULL, size INTEGER NOT NULL, crc INTEGER NOT NULL, payload BLOB NOT NULL, "
    "PRIMARY KEY (rollout_id, attempt_id, batch_id))",
    "CREATE TABLE IF NOT EXISTS events (number INTEGER PRIMARY KEY, body BLOB NOT NULL)",
    # Sums over spans read this index alone, not the payloads.
    "CREATE INDEX IF NOT EXISTS span_order ON spans (rollout_id, first, attempt_id, count, size)",
    "CREATE INDEX IF NOT EXISTS rollout_waiting ON rollout (position, key) WHERE position > 0",
    "CREATE INDEX IF NOT EXISTS rollout_created ON rollout (created, key)",
    "CREATE INDEX IF NOT EXISTS rollout_status ON rollout (status, created, key, mode)",  # mode: to count from
    "CREATE INDEX IF NOT EXISTS rollout_start ON rollout (start_time, key)",
    "CREATE INDEX IF NOT EXISTS rollout_end ON rollout (end_time, key) WHERE end_time IS NOT NULL",
    "CREATE INDEX IF NOT EXISTS attempt_order ON attempt (rollout_id, position)",
    "CREATE INDEX IF NOT EXISTS attempt_reason ON attempt (end_reason, key)",  # open ones: NULL
    "CREATE INDEX IF NOT EXISTS resources_order ON resources (position, key)",
    "CREATE INDEX IF NOT EXISTS resources_created ON resources (create_time, key)",
]

NEVER_EMPTY = {"key", "position", "created", "status", "start_time", "rollout_id", "attempt_id"}
"""Columns that hold a value in every record of the store."""


def upsert(kind: str) -> str:
    """The statement that writes a row (key, position, columns, body) over the one of the same key."""
    changing = [
        name for name in ("position", *COLUMNS[kind], "body") if name not in FIXED.get(kind, ())
    ]
    changes = ", ".join(f"{name} = excluded.{name}" for name in changing)
    marks = ", ".join("?" * (len(COLUMNS[kind]) + 3))
    return f"INSERT INTO {kind} VALUES ({marks}) ON CONFLICT (key) DO UPDATE SET {changes}"


UPSERT = {kind: upsert(kind) for kind in COLUMNS}
