"""The journal in a PostgreSQL database (`postgresql://user:password@host:port/database`), which several runs may share.

What it is: `PostgresJournal`, on SQLAlchemy's async core and psycopg 3, on the store's own event loop: one pool of connections, bulk
statements, one transaction per write. A database that goes away and comes back within `seconds` costs its callers waiting and
nothing else. Connect to the server itself or to a pooler in session mode: the lock that makes one store own a run is its session's.
Who calls it: `agl_ray.store.journals.opening.open_journal`. Test alone: tests/integration/test_store_postgres.py (it starts a server by
cluster/services.sh).
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from agl_ray import waits
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
from agl_ray.store.journals.postgres_live import has_run, read_live
from agl_ray.store.journals.postgres_owner import LOCK_SECONDS, RESTART_LOCK_SECONDS, Ownership
from agl_ray.store.journals.postgres_schema import EVENTS, KINDS, OWNER, SPANS, TABLES
from agl_ray.store.journals.postgres_setup import connect_arguments, migrate
from agl_ray.store.journals.postgres_sql import (
    Bulk,
    any_of,
    chunks,
    count,
    page,
    records,
    row_of,
    spans_of,
    starts_with,
    totals,
)
from agl_ray.store.journals.postgres_trouble import FAILURES, Server, parsed
from agl_ray.store.journals.settings import PoolSettings
from agl_ray.types import StoreError

log = logging.getLogger("agl_ray.store")
T = TypeVar("T")

OPEN_SECONDS = 10.0  # a store that starts for the first time: a wrong address should be said soon
CLOSE_SECONDS = 5.0
_PUT = {kind: Bulk(TABLES[kind], update=True) for kind in KINDS}
_ADD_SPANS = Bulk(SPANS, update=False)
_ADD_EVENTS = Bulk(EVENTS, update=True)


class PostgresJournal:
    """`seconds`: for how long reads and writes are tried again while the database is away."""

    durable = True

    def __init__(
        self, url: str, run_id: str, pool: PoolSettings | None = None, *, seconds: float = 60.0
    ) -> None:
        self._pool = pool or PoolSettings()
        self.run_id = run_id
        self._server = Server(parsed(url), run_id, seconds)
        self._engine: AsyncEngine | None = None
        self._owner: Ownership | None = None
        self._owner_engine: AsyncEngine | None = None

    async def open(self, *, must_exist: bool = False) -> Live:
        from agl_ray.store.payload import SCHEMA_PRINT

        self._make_engines()
        server, owner_engine, engine = self._server, *self._engines()
        self._owner = owner = Ownership(owner_engine, server)
        seconds = server.seconds if must_exist else min(OPEN_SECONDS, server.seconds)
        there = await server.persist(
            "open it", lambda: has_run(owner_engine, self.run_id), seconds=seconds
        )
        if must_exist and not there:
            raise StoreError(
                f"{server.name}: the run was there before the store restarted and is gone now; bring the database back, "
                "or start a new run"
            )
        await server.persist("make its tables", lambda: migrate(engine, server.name))
        lock = RESTART_LOCK_SECONDS if must_exist else LOCK_SECONDS
        taken = await server.persist(
            "take it", lambda: owner.take(SCHEMA_PRINT, lock), seconds=lock + seconds
        )
        if taken.span_schema != SCHEMA_PRINT:
            raise StoreError(
                f"{server.name}: span_schema is {taken.span_schema}, this agl_ray writes {SCHEMA_PRINT}; resume the run "
                "with the agl_ray that wrote it"
            )
        live = await self._read("load it", lambda connection: read_live(connection, self.run_id))
        last_event = max(live.last_event, taken.last_event)
        return live._replace(starts=taken.starts, last_event=last_event)

    def _make_engines(self) -> None:
        """Engines belong to the event loop that opens the journal."""
        url, pool = self._server.url, self._pool
        named: dict[str, Any] = {
            "connect_args": connect_arguments(url, self.run_id),
            "hide_parameters": True,
        }
        self._engine = create_async_engine(
            url,
            pool_size=pool.size,
            max_overflow=pool.max_overflow,
            pool_timeout=pool.timeout,
            pool_recycle=pool.recycle,
            pool_pre_ping=pool.pre_ping,
            **named,
        )
        # The owner's connection is no part of the pool: it is never recycled and never waits for a free place.
        self._owner_engine = create_async_engine(
            url, poolclass=NullPool, isolation_level="AUTOCOMMIT", **named
        )

    def _engines(self) -> tuple[AsyncEngine, AsyncEngine]:
        """(of the owner's connection, of the pool)"""
        if self._owner_engine is None or self._engine is None:
            raise StoreError(f"{self._server.name}: it is closed")
        return self._owner_engine, self._engine

    # Writing: one transaction that first shows the token. Harmless when repeated.

    async def write(
        self, rows: Sequence[Row], spans: Sequence[SpanRow], events: Sequence[EventRow] = ()
    ) -> None:
        newest = {(row.kind, row.key): row for row in rows}
        by_kind: dict[str, list[tuple[Any, ...]]] = {}
        for row in newest.values():
            values = (row.key, row.position, *row.columns, row.body)
            by_kind.setdefault(row.kind, []).append(values)
        new_spans = [_span_values(row) for row in spans]

        async def work(connection: AsyncConnection) -> None:
            for kind, values in by_kind.items():
                await self._put(connection, _PUT[kind], values)
            if await self._put(connection, _ADD_SPANS, new_spans) < len(new_spans):
                await self._check_repeated(connection, new_spans)
            await self._put(connection, _ADD_EVENTS, list(events))

        await self._write("write", work)

    async def forget(self, rollout_ids: Sequence[str]) -> None:
        async def work(connection: AsyncConnection) -> None:
            rollouts, attempts = TABLES["rollout"], TABLES["attempt"]
            named = (
                (SPANS, SPANS.c.rollout_id),
                (attempts, attempts.c.rollout_id),
                (rollouts, rollouts.c.key),
            )
            for table, column in named:
                where = (table.c.run_id == self.run_id, any_of(column, rollout_ids))
                await connection.execute(sa.delete(table).where(*where))

        await self._write("forget rollouts", work)

    async def drop_events(self, up_to: int) -> None:
        async def work(connection: AsyncConnection) -> None:
            dropped = (EVENTS.c.run_id == self.run_id, EVENTS.c.number <= up_to)
            highest = sa.select(sa.func.coalesce(sa.func.max(EVENTS.c.number), 0)).where(*dropped)
            # A number is never given twice, also where all events are forgotten.
            last = sa.func.greatest(OWNER.c.last_event, highest.scalar_subquery())
            noted = sa.update(OWNER).where(OWNER.c.run_id == self.run_id).values(last_event=last)
            await connection.execute(noted)
            await connection.execute(sa.delete(EVENTS).where(*dropped))

        await self._write("forget events", work)

    async def _write(self, doing: str, work: Callable[[AsyncConnection], Awaitable[None]]) -> None:
        _, engine = self._engines()
        if self._owner is None:
            raise StoreError(f"{self._server.name}: it is closed")
        owner = self._owner

        async def once() -> None:
            async with engine.begin() as connection:
                owner.must_be_ours((await connection.execute(owner.check)).scalar_one_or_none())
                await work(connection)

        await self._server.persist(doing, once)

    async def _put(
        self, connection: AsyncConnection, bulk: Bulk, rows: Sequence[Sequence[Any]]
    ) -> int:
        """The number of rows put."""
        number = 0
        for part in chunks(rows):
            done = await connection.execute(bulk.statement, bulk.values(self.run_id, part))
            number += done.rowcount
        return number

    async def _check_repeated(
        self, connection: AsyncConnection, new: Sequence[tuple[Any, ...]]
    ) -> None:
        """Batches that were there: the same ones, from a write whose answer was lost."""
        names = ("rollout_id", "attempt_id", "batch_id", "first", "number", "size", "crc")
        rollout_ids = sorted({row[0] for row in new})
        where = (SPANS.c.run_id == self.run_id, any_of(SPANS.c.rollout_id, rollout_ids))
        stored = await connection.execute(
            sa.select(*(SPANS.c[name] for name in names)).where(*where)
        )
        there = {tuple(row[:3]): tuple(row[3:]) for row in stored}
        for row in new:
            if there[row[:3]] != row[3:-1]:
                raise StoreError(
                    f"{self._server.name}: the span batch {row[2]!r} of rollout {row[0]!r}, attempt {row[1]!r} is there "
                    "already with other content; end this run and report it, with its log"
                )

    # Reading.

    async def _read(self, doing: str, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        _, engine = self._engines()
        reading = engine.execution_options(isolation_level="AUTOCOMMIT")  # of the same pool

        async def once() -> T:
            async with reading.connect() as connection:
                return await work(connection)

        return await self._server.persist(doing, once)

    async def _all(self, select: sa.Select[Any]) -> Sequence[Any]:
        async def work(connection: AsyncConnection) -> Sequence[Any]:
            return (await connection.execute(select)).all()

        return await self._read("read", work)

    async def rows(self, kind: str, keys: Sequence[str]) -> list[Row]:
        table = TABLES[kind]
        where = (table.c.run_id == self.run_id, any_of(table.c.key, keys))
        return [row_of(kind, row) for row in await self._all(records(kind).where(*where))]

    async def attempts_of(self, rollout_ids: Sequence[str]) -> list[Row]:
        table = TABLES["attempt"]
        where = (table.c.run_id == self.run_id, any_of(table.c.rollout_id, rollout_ids))
        found = await self._all(records("attempt").where(*where))
        rows = [row_of("attempt", row) for row in found]
        return sorted(rows, key=lambda row: (row.columns[0], row.position))

    async def span_totals(self, rollout_ids: Sequence[str]) -> list[SpanTotals]:
        found = await self._all(totals(self.run_id, rollout_ids))
        return [SpanTotals((row[0], row[1]), *row[2:]) for row in found]

    async def query(self, query: Query) -> Page:
        async def work(connection: AsyncConnection) -> Page:
            total = None
            if query.count:
                total = (await connection.execute(count(query, self.run_id))).scalar_one()
            found = [] if query.limit == 0 else await connection.execute(page(query, self.run_id))
            return Page([row_of(query.kind, row) for row in found], total)

        return await self._read("answer a question", work)

    async def keys(self, kind: str, prefix: str) -> list[str]:
        key = TABLES[kind].c.key
        where = [TABLES[kind].c.run_id == self.run_id, *starts_with(key, prefix)]
        return [row.key for row in await self._all(sa.select(key).where(*where).order_by(key))]

    async def payloads(self, keys: Sequence[AttemptKey]) -> list[SpanRow]:
        names = ("batch_id", "rollout_id", "attempt_id", "first", "number", "crc", "payload")
        select = spans_of(self.run_id, list(dict.fromkeys(keys)), names)
        found = await self._all(select)
        return [self._intact(row) for row in found]

    def _intact(self, row: Any) -> SpanRow:
        if zlib.crc32(row.payload) != row.crc:
            raise StoreError(
                f"{self._server.name}: the spans {row.first} to {row.first + row.number - 1} of rollout {row.rollout_id} "
                "are damaged (checksum); restore the database from a backup, or start a new run"
            )
        key = (row.rollout_id, row.attempt_id)
        return SpanRow(row.batch_id, key, row.first, row.number, row.payload)

    async def find_batch(self, key: AttemptKey, batch_id: str) -> BatchEntry | None:
        where = {"run_id": self.run_id, "rollout_id": key[0], "attempt_id": key[1]}
        select = sa.select(SPANS.c.first, SPANS.c.number).filter_by(**where, batch_id=batch_id)
        found = await self._all(select)
        return BatchEntry(*found[0]) if found else None

    async def events(self, after: int, limit: int) -> list[EventRow]:
        select = sa.select(EVENTS.c.number, EVENTS.c.body).filter_by(run_id=self.run_id)
        select = select.where(EVENTS.c.number > after).order_by(EVENTS.c.number)
        return [
            EventRow(*row) for row in await self._all(select.limit(limit if limit >= 0 else None))
        ]

    async def close(self) -> None:
        """Give the lock and the connections back. Also fit for a journal that failed half-way."""
        owner, self._owner = self._owner, None
        engines = filter(None, (self._owner_engine, self._engine))
        self._owner_engine = self._engine = None
        if owner is not None:
            await owner.release()
        for engine in engines:
            try:
                on = f"{self._server.name} to close its connections"
                await waits.wait(engine.dispose(), on=on, seconds=CLOSE_SECONDS)
            except (*FAILURES, TimeoutError) as error:  # nothing is lost: all writes were answered
                log.warning("%s: cannot close its connections: %s", self._server.name, error)


def _span_values(row: SpanRow) -> tuple[Any, ...]:
    size, crc = len(row.payload), zlib.crc32(row.payload)
    return (*row.key, row.batch_id, row.first, row.number, size, crc, row.payload)
