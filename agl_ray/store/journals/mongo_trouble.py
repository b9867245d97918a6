"""When MongoDB is away or refuses: what passes by itself is tried again for a while, everything is said in one sentence.

What it is: `Server`, the name of a journal's place (never with its password) and `persist`, which runs one piece of work until it is
done, its error is final, or the deadline is over. The work must be harmless when repeated: an answer may be lost after it was done.
Who calls it: `agl_ray.store.journals.mongo` and its parts. Test alone: tests/unit/test_store_mongo_parts.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

from bson.errors import BSONError
from pymongo import AsyncMongoClient
from pymongo.errors import (
    AutoReconnect,
    ConfigurationError,
    ConnectionFailure,
    OperationFailure,
    PyMongoError,
    WaitQueueTimeoutError,
)

from agl_ray import waits
from agl_ray.store.journals.settings import PoolSettings
from agl_ray.types import ConfigError, StoreError, WaitTimeout

log = logging.getLogger("agl_ray.store")
T = TypeVar("T")

PAUSE_SECONDS = 0.05  # before the second try; doubles
LONGEST_PAUSE = 1.0
FAILURES = (PyMongoError, BSONError, OSError)

# Codes after which the same work may go through a moment later (shutting down, no primary yet, write conflict, ...).
_PASSING = {6, 7, 89, 91, 112, 189, 251, 262, 9001, 10107, 11600, 11602, 13435, 13436}
_PASSING_LABELS = (
    "RetryableWriteError",
    "TransientTransactionError",
    "UnknownTransactionCommitResult",
)

_ADVICE = {
    "Authentication failed": "check user, password and authSource in store.url",
    "requires authentication": "store.url has no user and password: mongodb://USER:PASSWORD@HOST:PORT/?authSource=admin",
    "not authorized": "give the user of store.url the role readWrite on this database",
    "Connect call failed": "start the server, or check host and port in store.url",
    "onnection refused": "start the server, or check host and port in store.url",
    "Name or service not known": "check the host in store.url",
    "not known": "check the host in store.url",
    "timed out": "the server does not answer; check host, port and firewall",
    "No primary": "the replica set has no primary; see rs.status() there",
    "No replica set members": "check replicaSet in store.url, and rs.status() there",
    "connection pool": "raise DB_POOL_SIZE, DB_MAX_OVERFLOW or DB_POOL_TIMEOUT",
    "too large": "a document of MongoDB holds 16 MiB; keep large data in files",
    "No space": "the server's disk is full; free some space there and resume the run",
    "disk space": "the server's disk is full; free some space there and resume the run",
}


class Server:
    """`seconds`: how long work is tried again before it fails. ConfigError: a URL that the driver cannot read."""

    def __init__(self, url: str, run_id: str, database: str, seconds: float) -> None:
        parts = urlsplit(url)
        hosts = parts.netloc.rpartition("@")[2]
        if parts.scheme not in ("mongodb", "mongodb+srv") or not hosts:
            raise ConfigError(
                "store.url: expected mongodb://USER:PASSWORD@HOST:PORT or mongodb+srv://..., got something else"
            )
        self.url, self.run_id, self.seconds = url, run_id, seconds
        self.database = parts.path.strip("/") or database
        self.name = f"store journal mongodb {hosts}, database {self.database!r}, run {run_id!r}"
        self._given = {name.lower() for name, _ in parse_qsl(parts.query)}

    def client(self, pool: PoolSettings) -> AsyncMongoClient[Mapping[str, Any]]:
        """A client of the running event loop. What store.url says of timeouts and pool goes before the settings.

        A write is acknowledged by the majority and from disk, whatever the URL says. `pre_ping` has no place here: the driver's
        monitor looks after its connections all the time."""
        wanted: dict[str, Any] = {
            "maxPoolSize": pool.size + pool.max_overflow,
            "maxIdleTimeMS": int(pool.recycle * 1000) if pool.recycle > 0 else None,
            "waitQueueTimeoutMS": int(pool.timeout * 1000),
            "serverSelectionTimeoutMS": 3000,  # twice for a read, within OPEN_SECONDS
            "connectTimeoutMS": 5000,
            "appname": f"agl_ray {self.run_id}"[:100],
        }
        options = {name: value for name, value in wanted.items() if name.lower() not in self._given}
        try:
            return AsyncMongoClient(self.url, w="majority", journal=True, tz_aware=True, **options)
        except (ConfigurationError, PyMongoError, ValueError, TypeError) as error:
            raise ConfigError(f"store.url: {self.name}: {_text_of(error)}") from error

    async def persist(
        self, doing: str, work: Callable[[], Awaitable[T]], *, seconds: float | None = None
    ) -> T:
        """The result of `work()`. StoreError: what is wrong, and what to do."""
        clock = asyncio.get_running_loop().time
        seconds = self.seconds if seconds is None else seconds
        give_up, pause = clock() + seconds, PAUSE_SECONDS
        last: BaseException | None = None
        while True:
            try:
                left = max(give_up - clock(), 0.01)
                on = f"{self.name} to {doing}"
                result = await waits.wait(of_driver(work()), on=on, seconds=left)
            except WaitTimeout as error:
                if last is not None:
                    raise self.explained(doing, last) from error
                raise StoreError(
                    f"{self.name}: no answer within {seconds:g} s to {doing}; check the server and resume the run"
                ) from error
            except FAILURES as error:
                if not _passes(error) or clock() + pause > give_up:
                    raise self.explained(doing, error) from error
                if pause == PAUSE_SECONDS:
                    log.warning("%s; trying again for %g s", self.explained(doing, error), seconds)
                last = error
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                if pause > PAUSE_SECONDS:
                    log.warning("%s: it is back", self.name)
                return result

    def explained(self, doing: str, error: BaseException) -> StoreError:
        text = _text_of(error)
        advice = [advice for part, advice in _ADVICE.items() if part in text]
        return StoreError(
            f"{self.name}: cannot {doing}: {text} ({[*advice, 'check the server and its log'][0]})"
        )


async def of_driver(work: Awaitable[T]) -> T:
    """The result of `work`, an error of the driver's under its right name.

    pymongo 4.20 under Python 3.11, whose server dies while it looks for one, now and then finds its own lock released and raises a plain
    RuntimeError, where it should say that there is no server.
    """
    try:
        return await work
    except RuntimeError as error:
        if "un-acquired lock" not in str(error):
            raise
        raise AutoReconnect(f"no server was found: {error}") from error


def _passes(error: BaseException) -> bool:
    if isinstance(error, PyMongoError) and any(map(error.has_error_label, _PASSING_LABELS)):
        return True
    if isinstance(error, OperationFailure):
        return error.code in _PASSING
    return isinstance(error, ConnectionFailure | WaitQueueTimeoutError | OSError)


def _text_of(error: BaseException) -> str:
    """The first sentence, without the driver's description of its topology and timeouts."""
    text = " ".join(str(error).split())
    for more in (", full error", ", Topology Description", ", Timeout: ", " (configured timeouts"):
        text = text.split(more)[0]
    return text[:400] or type(error).__name__
