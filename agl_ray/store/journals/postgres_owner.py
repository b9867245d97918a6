"""One living store per run: an advisory lock while it lives, and a token that every write must show.

What it is: `Ownership`. The lock belongs to a connection of its own, so the server frees it when the process dies. The token is for the
store that lost its connection without knowing (the server restarted, the network broke, the process was paused): if a
successor took the run meanwhile, the token in the owner's row is another one, and the old store's transactions fail.
Who calls it: `agl_ray.store.journals.postgres`. Test alone: tests/integration/test_store_postgres.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
import socket
from typing import Any, NamedTuple

import psycopg
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from agl_ray import waits
from agl_ray.store.journals.postgres_schema import OWNER
from agl_ray.store.journals.postgres_trouble import FAILURES, Server, code_of
from agl_ray.types import StoreError

log = logging.getLogger("agl_ray.store")

LOCK_SECONDS = 10.0  # a killed store's connection may outlive it for a moment
RESTART_LOCK_SECONDS = 60.0  # and for half a minute where its machine died with it
CLOSE_SECONDS = 5.0
AGAIN_SECONDS = 5.0  # after an error that trying again at once does not mend
LOCK_NOT_AVAILABLE = "55P03"


class Taken(NamedTuple):
    """What the run's row says: how often the run was opened, the fingerprint of its spans' schema, the highest forgotten event."""

    starts: int
    span_schema: str
    last_event: int


class Ownership:
    """`take` it once, run `check` first in every transaction that writes, `release` it at the end."""

    def __init__(self, engine: AsyncEngine, server: Server) -> None:
        self._engine, self._server, self._run_id = engine, server, server.run_id
        self._connection: AsyncConnection | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._backend = 0  # the server's process behind our connection
        # Shown, and held until the transaction ends: a successor's `take` waits for it.
        self.check = (
            sa.select(OWNER.c.token)
            .where(OWNER.c.run_id == self._run_id)
            .with_for_update(read=True)
        )
        self.token = secrets.token_hex(16)
        self.lost: StoreError | None = None
        self.losses = 0  # connections that broke

    async def take(self, span_schema: str, seconds: float) -> Taken:
        """Wait at most `seconds` for a store that is just dying; StoreError where it lives."""
        await self._lock(seconds)
        taken = await self._write_token(span_schema)
        self._keeper = asyncio.get_running_loop().create_task(self._keep(), name="store-owner")
        return taken

    async def _lock(self, seconds: float) -> None:
        """Connect and wait for the lock, at most `seconds`."""
        await self._drop_connection()
        self._connection = connection = await self._engine.connect()
        await connection.execute(_set_timeout(seconds))
        backend = (await connection.execute(sa.select(sa.func.pg_backend_pid()))).scalar_one()
        try:
            await connection.execute(sa.select(sa.func.pg_advisory_lock(lock_key(self._run_id))))
        except sa.exc.DBAPIError as error:
            if code_of(error) != LOCK_NOT_AVAILABLE:
                raise
            raise await self._taken(error) from error
        self._backend = backend

    async def _taken(self, error: Exception) -> StoreError:
        row = await self._row()
        process = f" (process {row.process}, since {row.taken_at:%Y-%m-%d %H:%M:%S})" if row else ""
        return StoreError(
            f"{self._server.name}: another living store owns this run{process}; end it first, or give this run another run id"
        )

    async def _row(self) -> Any:
        connection = self._opened()
        return (
            await connection.execute(sa.select(OWNER).where(OWNER.c.run_id == self._run_id))
        ).one_or_none()

    async def _write_token(self, span_schema: str) -> Taken:
        """From here on only this store's writes go through; waits for one of its predecessor that is under way."""
        mine = {"token": self.token, "process": f"{socket.gethostname()}:{os.getpid()}"}
        insert = pg.insert(OWNER).values(
            run_id=self._run_id,
            starts=1,
            taken_at=sa.func.now(),
            span_schema=span_schema,
            last_event=0,
            **mine,
        )
        upsert = insert.on_conflict_do_update(
            index_elements=[OWNER.c.run_id],
            set_={**mine, "starts": OWNER.c.starts + 1, "taken_at": sa.func.now()},
        ).returning(OWNER.c.starts, OWNER.c.span_schema, OWNER.c.last_event)
        return Taken(*(await self._opened().execute(upsert)).one())

    def must_be_ours(self, token: str | None) -> None:
        if self.lost is not None:
            raise StoreError(str(self.lost))
        if token != self.token:
            self.lost = StoreError(
                f"{self._server.name}: another store has taken this run over"
                if token is not None
                else f"{self._server.name}: the run was removed from the database"
            )
            raise StoreError(f"{self.lost}; this one writes no more")

    # A connection that breaks is noticed at once and the lock taken again.

    async def _keep(self) -> None:
        while True:
            await self._until_broken()
            self.losses += 1
            log.warning(
                "%s: the owner's connection broke; taking the lock again", self._server.name
            )
            try:
                await self._server.persist("take its lock again", self._retake)
            except StoreError as error:
                # Writes go on failing or, where the token is still ours, are safe without the lock.
                log.error("%s", error)
                if self.lost is not None:
                    return
                await asyncio.sleep(AGAIN_SECONDS)

    async def _until_broken(self) -> None:
        """An idle connection is told by the kernel when its server has gone."""
        if self._connection is None:
            return
        raw = await self._connection.get_raw_connection()
        driver: psycopg.AsyncConnection[Any] = raw.driver_connection  # type: ignore[assignment]
        try:
            async for _ in driver.notifies():
                pass
        except psycopg.Error as error:
            log.debug("owner's connection: %s", error)

    async def _retake(self) -> None:
        try:
            await self._lock(LOCK_SECONDS)
        except StoreError:
            await self._check_token()
            await self._end_ghost()  # our own old connection, which the server has not given up yet
            await self._lock(RESTART_LOCK_SECONDS)
        await self._check_token()

    async def _check_token(self) -> None:
        row = await self._row()
        self.must_be_ours(row.token if row else None)

    async def _end_ghost(self) -> None:
        """End our old backend if it, and no other, still holds the lock."""
        ghost = sa.text(f"SELECT pg_terminate_backend(pid) {_HELD} AND pid = :pid")
        values = {"pid": self._backend, **_halves(self._run_id)}
        await self._opened().execute(ghost.bindparams(**values))

    def _opened(self) -> AsyncConnection:
        if self._connection is None:
            raise StoreError(f"{self._server.name}: it is closed")
        return self._connection

    async def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        try:
            on = f"{self._server.name} to close the owner's connection"
            await waits.wait(connection.invalidate(), on=on, seconds=CLOSE_SECONDS)
            await connection.close()
        except (*FAILURES, TimeoutError) as error:  # it was broken, which is why it is dropped
            log.debug("owner's connection: %s", error)

    async def release(self) -> None:
        """Give the lock back. Also fit for one that was never taken."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
            self._keeper = None
        await self._drop_connection()


def lock_key(run_id: str) -> int:
    """64 bits, signed, of a run's advisory lock."""
    digest = hashlib.blake2b(f"agl_ray/{run_id}".encode(errors="surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big", signed=True)


_HELD = (
    "FROM pg_locks WHERE locktype = 'advisory' AND granted AND classid::bigint = :high AND objid::bigint = :low AND objsubid = 1 "
    "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)
"""Who holds a run's lock, as part of a statement over `_halves` of the run."""


def _halves(run_id: str) -> dict[str, int]:
    key = lock_key(run_id) & (2**64 - 1)
    return {"high": key >> 32, "low": key & (2**32 - 1)}


async def is_locked(connection: AsyncConnection, run_id: str) -> bool:
    """Whether a living store owns the run."""
    held = sa.text(f"SELECT EXISTS (SELECT 1 {_HELD})").bindparams(**_halves(run_id))
    return bool((await connection.execute(held)).scalar_one())


def _set_timeout(seconds: float) -> sa.TextClause:
    return sa.text(f"SET lock_timeout = {int(seconds * 1000)}")
