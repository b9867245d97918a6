"""Reading the SQLite journal: rows of a statement, and what a store needs at its start.

Who calls it: `journals.sqlite`. Test alone: tests/unit/test_store_journal_contract.py.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from agl_ray.store.journals.base import COLUMNS, BatchEntry, Live, Row


def fields(kind: str) -> str:
    return ", ".join(["key", "position", *COLUMNS[kind], "body"])


def records(
    connection: sqlite3.Connection, kind: str, text: str, values: Iterable[Any] = ()
) -> Iterator[Row]:
    for key, position, *columns, body in connection.execute(text, tuple(values)):
        yield Row(kind, key, position, tuple(columns), body)


def read_live(connection: sqlite3.Connection, starts: int) -> Live:
    def one(text: str) -> Any:
        return connection.execute(text).fetchone()

    def pairs(text: str) -> list[tuple[str, int]]:
        return [(str(key), number) for key, number in connection.execute(text)]

    latest = f"SELECT {fields('resources')} FROM resources ORDER BY position DESC LIMIT 1"
    attempts = f"SELECT {fields('attempt')} FROM attempt WHERE end_reason IS NULL ORDER BY key"
    num_spans, span_bytes = one("SELECT SUM(count), SUM(size) FROM spans")
    open_attempts = list(records(connection, "attempt", attempts))
    by_mode = {
        (status, mode): number
        for status, mode, number in connection.execute(
            "SELECT status, mode, COUNT(*) FROM rollout GROUP BY status, mode"
        )
    }
    by_status: Counter[str] = Counter()
    for (status, _), number in by_mode.items():
        by_status[status] += number
    return Live(
        starts=starts,
        waiting=pairs("SELECT key, position FROM rollout WHERE position > 0 ORDER BY position"),
        open_attempts=open_attempts,
        open_batches=[
            (batch_id, (row.columns[0], row.columns[1]), BatchEntry(first, count))
            for row in open_attempts
            for batch_id, first, count in connection.execute(
                "SELECT batch_id, first, count FROM spans WHERE rollout_id = ? AND attempt_id = ?",
                row.columns[:2],
            )
        ],
        workers=list(records(connection, "worker", f"SELECT {fields('worker')} FROM worker")),
        latest_resources=next(records(connection, "resources", latest), None),
        rollouts_by_status=dict(by_status),
        rollouts_by_mode=by_mode,
        attempts_by_reason=dict(
            pairs("SELECT ifnull(end_reason, '') AS reason, COUNT(*) FROM attempt GROUP BY reason")
        ),
        num_resources=one("SELECT COUNT(*) FROM resources")[0],
        num_spans=num_spans or 0,
        span_bytes=span_bytes or 0,
        last_created=one("SELECT ifnull(MAX(created), 0) FROM rollout")[0],
        last_position=max(
            one("SELECT ifnull(MAX(position), 0) FROM rollout WHERE position > 0")[0],
            one("SELECT ifnull(MAX(position), 0) FROM resources")[0],
        ),
        last_event=one("SELECT ifnull(MAX(number), 0) FROM events")[0],
    )
