"""What a store that starts needs from its tables: everything open, and sums over the rest, each from an index.

Who calls it: `agl_ray.store.journals.postgres.PostgresJournal.open`. Test alone: tests/integration/test_store_postgres.py.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from agl_ray.store.journals.base import BatchEntry, Live
from agl_ray.store.journals.postgres_schema import EVENTS, OWNER, SPANS, TABLES
from agl_ray.store.journals.postgres_sql import records, row_of

ROLLOUT, ATTEMPT = TABLES["rollout"], TABLES["attempt"]
RESOURCES, WORKER = TABLES["resources"], TABLES["worker"]


async def has_run(engine: AsyncEngine, run_id: str) -> bool:
    """Whether the database knows the run; also the first answer of the server."""
    async with engine.connect() as connection:
        exists = sa.select(sa.func.to_regclass(OWNER.name).isnot(None))
        if not (await connection.execute(exists)).scalar_one():
            return False
        of_run = sa.select(sa.exists().where(OWNER.c.run_id == run_id))
        return bool((await connection.execute(of_run)).scalar_one())


async def read_live(connection: AsyncConnection, run_id: str) -> Live:
    """Everything in `Live` but `starts`; `last_event` of the events that are there."""

    async def many(select: sa.Select[Any]) -> list[Any]:
        return list((await connection.execute(select)).all())

    async def one(select: sa.Select[Any]) -> Any:
        return (await connection.execute(select)).one()

    sums: list[Any] = [_sum(SPANS.c.number), _sum(SPANS.c.size)]
    spans = await one(sa.select(*sums).where(SPANS.c.run_id == run_id))
    resources = records("resources").where(RESOURCES.c.run_id == run_id)
    latest = await many(resources.order_by(RESOURCES.c.position.desc()).limit(1))
    attempts = records("attempt").where(ATTEMPT.c.run_id == run_id, ATTEMPT.c.end_reason.is_(None))
    workers = records("worker").where(WORKER.c.run_id == run_id).order_by(WORKER.c.key)
    positions = [await one(_highest(table.c.position, run_id)) for table in (ROLLOUT, RESOURCES)]
    reasons = await many(_counts(ATTEMPT.c.end_reason, run_id))
    kinds = await many(_by_mode(run_id))
    by_mode = {(row[0], row[1]): row[2] for row in kinds}
    by_status: Counter[str] = Counter()
    for row in kinds:
        by_status[row[0]] += row[2]
    return Live(
        waiting=[(row.key, row.position) for row in await many(_waiting(run_id))],
        open_attempts=[
            row_of("attempt", row) for row in await many(attempts.order_by(ATTEMPT.c.key))
        ],
        open_batches=[
            (row[0], (row[1], row[2]), BatchEntry(row[3], row[4]))
            for row in await many(_open_batches(run_id))
        ],
        workers=[row_of("worker", row) for row in await many(workers)],
        latest_resources=row_of("resources", latest[0]) if latest else None,
        rollouts_by_status=dict(by_status),
        rollouts_by_mode=by_mode,
        attempts_by_reason={row[0] or "": row[1] for row in reasons},
        num_resources=(await one(_number(RESOURCES, run_id)))[0],
        num_spans=spans[0],
        span_bytes=spans[1],
        last_created=(await one(_highest(ROLLOUT.c.created, run_id)))[0],
        last_position=max(position[0] for position in positions),
        last_event=(await one(_highest(EVENTS.c.number, run_id)))[0],
    )


def _waiting(run_id: str) -> sa.Select[Any]:
    select = sa.select(ROLLOUT.c.key, ROLLOUT.c.position)
    return select.where(ROLLOUT.c.run_id == run_id, ROLLOUT.c.position > 0).order_by(
        ROLLOUT.c.position
    )


def _open_batches(run_id: str) -> sa.Select[Any]:
    names = ("batch_id", "rollout_id", "attempt_id", "first", "number")
    of_attempt = sa.and_(
        SPANS.c.run_id == ATTEMPT.c.run_id,
        SPANS.c.rollout_id == ATTEMPT.c.rollout_id,
        SPANS.c.attempt_id == ATTEMPT.c.attempt_id,
    )
    select = sa.select(*(SPANS.c[name] for name in names)).select_from(
        ATTEMPT.join(SPANS, of_attempt)
    )
    return select.where(ATTEMPT.c.run_id == run_id, ATTEMPT.c.end_reason.is_(None)).order_by(
        SPANS.c.rollout_id, SPANS.c.first
    )


def _counts(column: sa.Column[Any], run_id: str) -> sa.Select[Any]:
    return (
        sa.select(column, sa.func.count()).where(column.table.c.run_id == run_id).group_by(column)
    )


def _by_mode(run_id: str) -> sa.Select[Any]:
    columns = (ROLLOUT.c.status, ROLLOUT.c.mode)
    select = sa.select(*columns, sa.func.count()).where(ROLLOUT.c.run_id == run_id)
    return select.group_by(*columns)


def _highest(column: sa.Column[Any], run_id: str) -> sa.Select[Any]:
    return sa.select(sa.func.coalesce(sa.func.max(column), 0)).where(
        column.table.c.run_id == run_id
    )


def _sum(column: sa.Column[Any]) -> sa.ColumnElement[int]:
    return sa.cast(sa.func.coalesce(sa.func.sum(column), 0), sa.BigInteger)


def _number(table: sa.Table, run_id: str) -> sa.Select[Any]:
    return sa.select(sa.func.count()).select_from(table).where(table.c.run_id == run_id)
