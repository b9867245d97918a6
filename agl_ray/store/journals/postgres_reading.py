"""A run's journal in PostgreSQL opened for reading alone, whether its store lives or not.

What it is: one connection in one transaction that may not write (REPEATABLE READ, READ ONLY), so that everything it answers is of one moment
however long it takes. It takes no lock, counts no start, makes no table and waits for nobody; the store goes on writing meanwhile.
A connection that breaks ends it: another one would answer of another moment.
Who calls it: `agl_ray.store.archive`. Test alone: tests/integration/test_store_postgres_reading.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

from agl_ray import waits
from agl_ray.store.journals.base import Live
from agl_ray.store.journals.postgres import OPEN_SECONDS, PostgresJournal
from agl_ray.store.journals.postgres_live import read_live
from agl_ray.store.journals.postgres_owner import is_locked
from agl_ray.store.journals.postgres_schema import HEAD, OWNER
from agl_ray.store.journals.postgres_setup import connect_arguments, version_of
from agl_ray.store.journals.postgres_trouble import FAILURES
from agl_ray.store.payload import SCHEMA_PRINT
from agl_ray.types import StoreError, WaitTimeout

T = TypeVar("T")

SHOWN = 5  # run ids that an error names


class PostgresReading(PostgresJournal):
    """The run must be there. `alive`: whether a store owned it when this was opened."""

    alive = False
    _connection: AsyncConnection | None = None

    async def open(self, *, must_exist: bool = False) -> Live:
        del must_exist  # a reader always expects its run
        url, server = self._server.url, self._server
        self._turn = asyncio.Lock()  # one connection answers one question at a time
        self._engine = create_async_engine(
            url,
            poolclass=NullPool,
            isolation_level="REPEATABLE READ",
            connect_args=connect_arguments(url, self.run_id),
            hide_parameters=True,
        )
        seconds = min(OPEN_SECONDS, server.seconds)
        self._connection = await server.persist("open it", self._connect, seconds=seconds)
        return await self._read("load it", self._look)

    async def _connect(self) -> AsyncConnection:
        assert self._engine is not None
        connection = await self._engine.connect()
        try:
            await connection.execution_options(postgresql_readonly=True)
            # Whoever writes an export may take longer between two questions than a store that was abandoned.
            await connection.execute(sa.text("SET idle_in_transaction_session_timeout = 0"))
        except BaseException:
            await connection.close()
            raise
        return connection

    async def _look(self, connection: AsyncConnection) -> Live:
        version = await version_of(connection)
        if version is None:
            raise StoreError(f"{self._server.name}: this database holds no store")
        if version != HEAD:
            raise StoreError(
                f"{self._server.name}: its tables are of version {version}, this agl_ray reads {HEAD}; resume the run with "
                "the agl_ray that wrote it, or open it once with this one (a newer agl_ray brings older tables up)"
            )
        of_run = sa.select(OWNER).where(OWNER.c.run_id == self.run_id)
        row = (await connection.execute(of_run)).one_or_none()
        if row is None:
            await self._no_run(connection)
        if row.span_schema != SCHEMA_PRINT:
            raise StoreError(
                f"{self._server.name}: span_schema is {row.span_schema}, this agl_ray reads {SCHEMA_PRINT}; read it with "
                "the agl_ray that wrote it"
            )
        self.alive = await is_locked(connection, self.run_id)
        live = await read_live(connection, self.run_id)
        return live._replace(starts=row.starts, last_event=max(live.last_event, row.last_event))

    async def _no_run(self, connection: AsyncConnection) -> NoReturn:
        names = sa.select(OWNER.c.run_id).order_by(OWNER.c.taken_at.desc()).limit(SHOWN)
        known = ", ".join(repr(row.run_id) for row in await connection.execute(names))
        there = f"; the newest runs in it are {known}: name one by --run-id" if known else ""
        raise StoreError(f"{self._server.name}: there is no such run in the database{there}")

    async def _read(self, doing: str, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        server = self._server
        async with self._turn:
            if self._connection is None:
                raise StoreError(f"{server.name}: it is closed")
            try:
                on = f"{server.name} to {doing}"
                return await waits.wait(work(self._connection), on=on, seconds=server.seconds)
            except WaitTimeout as error:
                raise StoreError(
                    f"{server.name}: no answer within {server.seconds:g} s to {doing}; check the server and ask again"
                ) from error
            except FAILURES as error:
                raise server.explained(doing, error) from error

    async def _write(self, doing: str, work: Any) -> None:
        del work
        raise StoreError(f"{self._server.name}: cannot {doing}: it was opened for reading alone")

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        try:
            if connection is not None:
                await connection.close()
        finally:
            await super().close()
