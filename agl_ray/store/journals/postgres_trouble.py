"""When the database is away or refuses: what passes by itself is tried again for a while, everything is said in one sentence.

What it is: `Server`, the name of a journal's place (never with its password) and `persist`, which runs one piece of work until it is
done, its error is final, or the deadline is over. The work must be harmless when repeated: an answer may be lost after its commit.
Who calls it: `agl_ray.store.journals.postgres` and `postgres_owner`. Test alone: tests/unit/test_store_postgres_schema.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import psycopg
import sqlalchemy as sa

from agl_ray import waits
from agl_ray.types import AglError, ConfigError, StoreError, WaitTimeout

log = logging.getLogger("agl_ray.store")
T = TypeVar("T")

PAUSE_SECONDS = 0.05  # before the second try; doubles
LONGEST_PAUSE = 1.0
FAILURES = (sa.exc.SQLAlchemyError, psycopg.Error, OSError)

# SQLSTATE classes and codes (PostgreSQL, appendix A) after which the same work may go through a moment later.
_PASSING = ("08", "40", "53", "57P", "25P03", "55P03", "58")
# Answers to a connection that time does not mend (they come without a code).
_REFUSED: tuple[str, ...] = (
    "authentication failed",
    "no password supplied",
    "no pg_hba.conf entry",
    "does not exist",
    "permission denied",
    "is not permitted",
    "invalid connection option",
    "invalid integer value",
    "invalid sslmode",
    "does not support SSL",
    "certificate verify failed",
)

_ADVICE = {
    "password authentication failed": "check user and password in store.url",
    "no password supplied": "store.url has no password: postgresql://USER:PASSWORD@HOST:PORT/DATABASE",
    "no pg_hba.conf entry": "the server does not let this user in from here; see its pg_hba.conf",
    "permission denied for schema": "let the user make tables: GRANT CREATE, USAGE ON SCHEMA public TO the user of store.url",
    "no schema has been selected": "let the user make tables: GRANT CREATE, USAGE ON SCHEMA public TO the user of store.url",
    "permission denied": "grant the user of store.url what is missing",
    "could not translate host name": "check the host in store.url",
    "failed to resolve host": "check the host in store.url",
    "onnection refused": "start the server, or check host and port in store.url",
    "timeout expired": "the server does not answer; check host, port and firewall",
    "too many": "the server has no free connection: fewer runs, a smaller DB_POOL_SIZE, or a larger max_connections there",
    "remaining connection slots": "the server has no free connection: a smaller DB_POOL_SIZE, or a larger max_connections there",
    "QueuePool limit": "raise DB_POOL_SIZE, DB_MAX_OVERFLOW or DB_POOL_TIMEOUT",
    "No space left": "the server's disk is full; free some space there and resume the run",
    "could not extend": "the server's disk is full; free some space there and resume the run",
    "read-only transaction": "this server is a standby; point store.url at the primary",
    "shutting down": "start the server again and resume the run",
    "starting up": "wait until the server is up and resume the run",
    "invalid page": "the server's files are damaged; restore them from a backup",
}


class Server:
    """`seconds`: how long work is tried again before it fails."""

    def __init__(self, url: sa.URL, run_id: str, seconds: float) -> None:
        self.url, self.run_id, self.seconds = url, run_id, seconds
        place = f"{url.host or 'local socket'}:{url.port or 5432}"
        self.name = f"store journal postgresql {place}, database {url.database!r}, run {run_id!r}"

    async def persist(
        self, doing: str, work: Callable[[], Awaitable[T]], *, seconds: float | None = None
    ) -> T:
        """The result of `work()`. StoreError: what is wrong, and what to do."""
        clock = asyncio.get_running_loop().time
        seconds = self.seconds if seconds is None else seconds
        give_up, pause = clock() + seconds, PAUSE_SECONDS
        while True:
            try:
                left = max(give_up - clock(), 0.01)
                result = await waits.wait(work(), on=f"{self.name} to {doing}", seconds=left)
            except WaitTimeout as error:
                raise StoreError(
                    f"{self.name}: no answer within {seconds:g} s to {doing}; check the server and resume the run"
                ) from error
            except FAILURES as error:
                if isinstance(ours := getattr(error, "orig", None), AglError):
                    raise ours from error  # a value that is none, found while the statement was made
                if not _passes(error) or clock() + pause > give_up:
                    raise self.explained(doing, error) from error
                if pause == PAUSE_SECONDS:
                    log.warning("%s; trying again for %g s", self.explained(doing, error), seconds)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                if pause > PAUSE_SECONDS:
                    log.warning("%s: it is back", self.name)
                return result

    def explained(self, doing: str, error: BaseException) -> StoreError:
        text = _text_of(error)
        advice = [advice for part, advice in _ADVICE.items() if part in text]
        if "does not exist" in text and "database" in text:
            advice = [f"make it: CREATE DATABASE {self.url.database}"]
        elif "does not exist" in text and "role" in text:
            advice = [f"make the user: CREATE USER {self.url.username} PASSWORD '...'"]
        return StoreError(
            f"{self.name}: cannot {doing}: {text} ({[*advice, 'check the server and its log'][0]})"
        )


def parsed(url: str) -> sa.URL:
    """`url` for SQLAlchemy with psycopg. ConfigError without the password."""
    try:
        found = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError) as error:
        raise ConfigError(
            "store.url: expected postgresql://USER:PASSWORD@HOST:PORT/DATABASE (special characters percent-encoded), "
            "got something that cannot be read"
        ) from error
    if not found.database:
        raise ConfigError(
            "store.url: expected a database, postgresql://USER:PASSWORD@HOST:PORT/DATABASE, "
            f"got {found.render_as_string(hide_password=True)}"
        )
    return found.set(drivername="postgresql+psycopg")


def code_of(error: BaseException) -> str:
    """SQLSTATE, or "" where the server sent none (no connection)."""
    return getattr(getattr(error, "orig", None) or error, "sqlstate", None) or ""


def _passes(error: BaseException) -> bool:
    code = code_of(error)
    if code:
        return code.startswith(_PASSING)
    cause = getattr(error, "orig", None) or error
    if isinstance(cause, psycopg.OperationalError | psycopg.InterfaceError | OSError):
        return not any(part in str(cause) for part in _REFUSED)
    return isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated


def _text_of(error: BaseException) -> str:
    """The first sentence, without the statement and its values."""
    text = " ".join(str(getattr(error, "orig", None) or error).split())
    return text[:400] or type(error).__name__
