"""One living store per run: a document with the token of the store that may write, and a count that moves while it lives.

What it is: `Ownership`. Every write of a store compares the token in the same step that makes it count, so a store that was paused while a
successor took the run writes nothing more. The count (`beat`) moves with every write and every BEAT_SECONDS. A successor takes a
run that was given back, whose process is known to be dead (same machine), or whose count stands still for `lease_seconds`
by the successor's own clock: clocks of machines are never compared.
Who calls it: `agl_ray.store.journals.mongo`. Test alone: tests/unit/test_store_mongo.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import DuplicateKeyError

from agl_ray.store.journals.mongo_documents import Document
from agl_ray.store.journals.mongo_trouble import FAILURES, Server
from agl_ray.types import StoreError

log = logging.getLogger("agl_ray.store")

VERSION = 1
LEASE_SECONDS = 10.0
BEAT_SECONDS = 2.0
LOOK_SECONDS = (
    0.25  # between looks at another store's count: a server without change streams tells nobody
)
CLOSE_SECONDS = 5.0


class Ownership:
    """`take` it once, put `condition` into every write's first step, `release` it at the end.

    turn: held by whoever changes the owner's document. The document: token (None: free), beat, starts, process, and of the
    journal group (number of the last write), parts, redo (see `mongo_groups`), last_event, version, span_schema."""

    def __init__(
        self, documents: Callable[[], AsyncCollection[Any]], server: Server, lease_seconds: float
    ) -> None:
        self._documents, self._server, self._run_id = documents, server, server.run_id
        self._lease = lease_seconds
        self._keeper: asyncio.Task[None] | None = None
        self.token = secrets.token_hex(16)
        self.turn = asyncio.Lock()
        self.lost: StoreError | None = None
        self._ended = False

    @property
    def condition(self) -> Document:
        return {"_id": self._run_id, "token": self.token}

    async def document(self) -> Document | None:
        found: Document | None = await self._documents().find_one({"_id": self._run_id})
        return found

    async def take(self, span_schema: str) -> Document:
        """The owner's document as it is now. Waits for a store that is just dying; StoreError where one lives."""
        loop = asyncio.get_running_loop()
        since, first_beat, last_beat = loop.time(), None, None
        start = since
        while True:
            there = await self._server.persist("take it", self.document)
            if there is None:
                if await self._server.persist("take it", lambda: self._insert(span_schema)):
                    break
                continue
            self._check(there, span_schema)
            beat = (there["token"], there["beat"])
            if beat != last_beat:
                since, last_beat = loop.time(), beat
                first_beat = first_beat or beat
            still = loop.time() - since >= self._lease
            if there["token"] is None or still or _is_dead(there["process"]):
                if await self._server.persist("take it", partial(self._swap, there)):
                    break
                continue
            if beat != first_beat and loop.time() - start >= self._lease:
                raise StoreError(
                    f"{self._server.name}: another living store owns this run (process {there['process']['pid']} on "
                    f"{there['process']['host']}); end it first, or give this run another run id"
                )
            await asyncio.sleep(min(LOOK_SECONDS, self._lease / 10))
        taken = await self._server.persist("take it", self.document)
        if taken is None:
            raise StoreError(f"{self._server.name}: the run was removed from the database")
        self._keeper = loop.create_task(self._keep(), name="store-owner")
        return taken

    def _check(self, there: Document, span_schema: str) -> None:
        ours = {"version": VERSION, "span_schema": span_schema}
        for name, value in ours.items():
            if there[name] != value:
                raise StoreError(
                    f"{self._server.name}: {name} is {there[name]}, this agl_ray writes {value}; resume the run with the "
                    "agl_ray that wrote it"
                )

    async def _insert(self, span_schema: str) -> bool:
        new = {"version": VERSION, "span_schema": span_schema, "starts": 1, "last_event": 0}
        new |= {"group": 0, "parts": 0, "redo": None, "beat": 0, "process": _process()}
        try:
            await self._documents().insert_one({**self.condition, **new})
        except DuplicateKeyError:  # another store was faster, or our own answer was lost
            there = await self.document()
            return there is not None and there["token"] == self.token
        return True

    async def _swap(self, old: Document) -> bool:
        """Take it from exactly the state that was seen. True also where our own answer was lost."""
        seen = {"_id": self._run_id, "token": old["token"], "beat": old["beat"]}
        change = {"$set": {"token": self.token, "process": _process()}}
        done = await self._documents().update_one(
            seen, {**change, "$inc": {"starts": 1, "beat": 1}}
        )
        if done.matched_count:
            return True
        there = await self.document()
        return there is not None and there["token"] == self.token

    async def lose(self) -> StoreError:
        """The error of a write whose condition did not hold."""
        there = await self.document()
        what = (
            "the run was removed from the database"
            if there is None
            else "another store has taken this run over"
        )
        self.lost = StoreError(f"{self._server.name}: {what}; this one writes no more")
        return self.lost

    def must_be_ours(self) -> None:
        if self.lost is not None:
            raise StoreError(str(self.lost))

    async def _keep(self) -> None:
        """Move the count while nobody writes."""
        while self.lost is None and not self._ended:
            await asyncio.sleep(min(BEAT_SECONDS, self._lease / 5))
            try:
                async with self.turn:
                    done = await self._server.persist("keep it", self._beat, seconds=self._lease)
                    if not done:
                        log.error("%s", await self.lose())
            except (StoreError, *FAILURES) as error:  # a write will say so, if there is one
                log.warning("%s", error)

    async def _beat(self) -> bool:
        done = await self._documents().update_one(self.condition, {"$inc": {"beat": 1}})
        return bool(done.matched_count)

    async def release(self) -> None:
        """Give the run back. Also fit for one that was never taken."""
        if self._keeper is None:
            return
        self._ended = True  # the driver may take a cancellation for an error of the network
        self._keeper.cancel()
        await asyncio.wait([self._keeper])
        self._keeper = None
        try:
            seconds = min(CLOSE_SECONDS, self._server.seconds)
            await self._server.persist("give it back", self._give_back, seconds=seconds)
        except (StoreError, *FAILURES) as error:  # the lease will run out
            log.warning("%s", error)

    async def _give_back(self) -> None:
        await self._documents().update_one(self.condition, {"$set": {"token": None}})


def _process() -> Document:
    me = psutil.Process()
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": me.pid,
        "started": me.create_time(),
    }


def _machine() -> str | None:
    """This boot of this kernel and the namespace of its process ids; None where that cannot be known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _is_dead(process: Document) -> bool:
    """Whether a process of this machine is certainly gone; False for those of others."""
    if process["machine"] is None or process["machine"] != _machine():
        return False
    try:
        there = psutil.Process(process["pid"])
        if there.status() == psutil.STATUS_ZOMBIE:
            return True
        return abs(there.create_time() - process["started"]) > 1.0
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False
