"""The journal in a MongoDB database (`mongodb://user:password@host:port`, `mongodb+srv://...`), which several runs may share.

What it is: `MongoJournal`, on pymongo's asynchronous client, on the store's own event loop: a collection per kind of record, one of
spans, one of events. On a replica set every write is a transaction; elsewhere it is made whole by the journal itself
(`mongo_groups`). A database that goes away and comes back within `seconds` costs its callers waiting and nothing else.
Who calls it: `agl_ray.store.journals.opening.open_journal`. Test alone: tests/unit/test_store_mongo.py (against AGL_TEST_MONGO_URL, or
the wire server of tests/mongo_wire.py).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeVar

from pymongo import AsyncMongoClient, IndexModel
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.asynchronous.database import AsyncDatabase

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
from agl_ray.store.journals.mongo_documents import (
    CHUNK,
    EVENT,
    INDEXES,
    OWNER,
    SPAN,
    Document,
    checked,
    chunk_ids,
    filter_of,
    key_of,
    put_event,
    put_row,
    put_span,
    row_of,
    scope,
    sort_of,
    span_of,
    with_prefix,
)
from agl_ray.store.journals.mongo_gate import Gate
from agl_ray.store.journals.mongo_groups import Group, Groups
from agl_ray.store.journals.mongo_live import read_live
from agl_ray.store.journals.mongo_owner import LEASE_SECONDS, Ownership
from agl_ray.store.journals.mongo_trouble import FAILURES, Server, of_driver
from agl_ray.store.journals.settings import PoolSettings
from agl_ray.types import StoreError

log = logging.getLogger("agl_ray.store")
T = TypeVar("T")

OPEN_SECONDS = 10.0  # a store that starts for the first time: a wrong address should be said soon
CLOSE_SECONDS = 5.0
MANY = 2000  # ids in one question


class MongoJournal:
    """database: where the URL names none. `seconds`: for how long reads and writes are tried again while the server is away.
    lease_seconds: for how long a store on another machine must be silent before this one takes its run."""

    durable = True

    def __init__(
        self,
        url: str,
        run_id: str,
        pool: PoolSettings | None = None,
        database: str = "agl_ray",
        *,
        seconds: float = 60.0,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self._pool = pool or PoolSettings()
        self._server = Server(url, run_id, database, seconds)
        self._lease = lease_seconds
        self.run_id = run_id
        self._client: AsyncMongoClient[Any] | None = None
        self._owner: Ownership | None = None
        self._groups: Groups | None = None
        self._gate = Gate()

    # Life.

    async def open(self, *, must_exist: bool = False) -> Live:
        from agl_ray.store.payload import SCHEMA_PRINT

        server = self._server
        self._client = client = server.client(self._pool)
        owner = Ownership(lambda: self._in(OWNER), server, self._lease)
        seconds = server.seconds if must_exist else min(OPEN_SECONDS, server.seconds)
        there = await server.persist("open it", owner.document, seconds=seconds)
        if must_exist and there is None:
            raise StoreError(
                f"{server.name}: the run was there before the store restarted and is gone now; bring the database back, "
                "or start a new run"
            )
        await server.persist("make its indexes", self._make_indexes)
        owned = await owner.take(SCHEMA_PRINT)
        self._owner = owner
        self._groups = Groups(client, server.database, server, owner, self._gate)
        await self._groups.open(owned)
        live = await server.persist("load it", lambda: read_live(self._database(), self.run_id))
        last_event = max(live.last_event, owned["last_event"])
        return live._replace(starts=owned["starts"], last_event=last_event)

    async def _make_indexes(self) -> None:
        for name, indexes in INDEXES.items():
            models = [IndexModel([(field, 1) for field in fields]) for fields in indexes]
            await self._in(name).create_indexes(models)

    async def close(self) -> None:
        """Give the run and the connections back. Also fit for a journal that failed half-way."""
        owner, client = self._owner, self._client
        self._groups = self._owner = None
        if owner is not None:
            await owner.release()
        self._client = None
        if client is None:
            return
        # The first try may wait for a dead server to end its sessions; the second has none to end.
        for _ in range(2):
            try:
                on = f"{self._server.name} to close its connections"
                await waits.wait(of_driver(client.close()), on=on, seconds=CLOSE_SECONDS)
            except (*FAILURES, TimeoutError) as error:  # nothing is lost: all writes were answered
                log.warning("%s: cannot close its connections: %s", self._server.name, error)
            else:
                return

    def _database(self) -> AsyncDatabase[Any]:
        if self._client is None:
            raise StoreError(f"{self._server.name}: it is closed")
        return self._client[self._server.database]

    def _in(self, collection: str) -> AsyncCollection[Any]:
        return self._database()[collection]

    # Writing.

    async def write(
        self, rows: Sequence[Row], spans: Sequence[SpanRow], events: Sequence[EventRow] = ()
    ) -> None:
        newest = {(row.kind, row.key): row for row in rows}

        def make(number: int) -> Group:
            puts = [put_row(self.run_id, row, number) for row in newest.values()]
            puts += [put for span in spans for put in put_span(self.run_id, span, number)]
            puts += [put_event(self.run_id, event, number) for event in events]
            last = max((event.number for event in events), default=0)
            return Group(checked(puts), last_event=last)

        await self._write("write", make)

    async def forget(self, rollout_ids: Sequence[str]) -> None:
        await self._write("forget rollouts", lambda _: Group(forget=rollout_ids))

    async def drop_events(self, up_to: int) -> None:
        await self._write("forget events", lambda _: Group(drop_events=up_to))

    async def _write(self, doing: str, make: Callable[[int], Group]) -> None:
        if self._groups is None:
            raise StoreError(f"{self._server.name}: it is closed")
        await self._groups.write(doing, make)

    # Reading.

    async def _read(self, doing: str, work: Callable[[], Awaitable[T]]) -> T:
        async def once() -> T:
            async with self._gate.among():
                return await work()

        return await self._server.persist(doing, once)

    async def _all(self, collection: str, condition: Document, **options: Any) -> list[Document]:
        async def work() -> list[Document]:
            return await self._in(collection).find(condition, **options).to_list()

        return await self._read("read", work)

    async def rows(self, kind: str, keys: Sequence[str]) -> list[Row]:
        return [
            row_of(kind, document)
            for names in _parts([scope(self.run_id) + key for key in dict.fromkeys(keys)])
            for document in await self._all(kind, {"_id": {"$in": names}})
        ]

    async def attempts_of(self, rollout_ids: Sequence[str]) -> list[Row]:
        rows = [
            row_of("attempt", document)
            for ids in _parts(list(dict.fromkeys(rollout_ids)))
            for document in await self._all(
                "attempt", {"run": self.run_id, "rollout_id": {"$in": ids}}
            )
        ]
        return sorted(rows, key=lambda row: (row.columns[0], row.position))

    async def span_totals(self, rollout_ids: Sequence[str]) -> list[SpanTotals]:
        totals: list[SpanTotals] = []
        for ids in _parts(list(dict.fromkeys(rollout_ids))):
            sums = {
                "_id": {"rollout_id": "$rollout_id", "attempt_id": "$attempt_id"},
                "number": {"$sum": "$number"},
                "last": {"$max": "$last"},
                "size": {"$sum": "$size"},
            }
            match = {"run": self.run_id, "rollout_id": {"$in": ids}}

            async def work(match: Document = match, sums: Document = sums) -> list[Document]:
                return await _aggregated(self._in(SPAN), [{"$match": match}, {"$group": sums}])

            totals += [
                SpanTotals(key_of(one["_id"]), one["number"], one["last"], one["size"])
                for one in await self._read("read", work)
            ]
        return totals

    async def query(self, query: Query) -> Page:
        async def work() -> Page:
            of, total = self._in(query.kind), None
            if query.count:
                match = filter_of(self.run_id, query, paged=False)
                counted = await _aggregated(
                    of, [{"$match": match}, {"$group": {"_id": None, "n": {"$sum": 1}}}]
                )
                total = counted[0]["n"] if counted else 0
            if query.limit == 0:  # which means "all" to MongoDB
                return Page([], total)
            found = of.find(filter_of(self.run_id, query, paged=True), sort=sort_of(query))
            found = found.skip(query.offset).limit(max(query.limit, 0))
            return Page([row_of(query.kind, one) for one in await found.to_list()], total)

        return await self._read("answer a question", work)

    async def keys(self, kind: str, prefix: str) -> list[str]:
        found = await self._all(kind, with_prefix(self.run_id, prefix), projection=["_id"])
        return sorted(one["_id"].removeprefix(scope(self.run_id)) for one in found)

    async def payloads(self, keys: Sequence[AttemptKey]) -> list[SpanRow]:
        found: dict[AttemptKey, list[SpanRow]] = {key: [] for key in keys}
        for some in _parts(list(found), 100):
            any_of = [{"rollout_id": key[0], "attempt_id": key[1]} for key in some]
            match = {"run": self.run_id, "$or": any_of}

            async def work(match: Document = match) -> list[SpanRow]:
                documents = await self._in(SPAN).find(match).to_list()
                names = [name for one in documents for name in chunk_ids(one)]
                chunks = {
                    one["_id"]: bytes(one["payload"])
                    for part in _parts(names)
                    for one in await self._in(CHUNK).find({"_id": {"$in": part}}).to_list()
                }
                return [span_of(one, chunks) for one in documents]

            for span in sorted(await self._read("read spans", work), key=lambda one: one.first):
                found[span.key].append(span)
        return [span for key in found for span in found[key]]

    async def find_batch(self, key: AttemptKey, batch_id: str) -> BatchEntry | None:
        match = {"run": self.run_id, "rollout_id": key[0], "attempt_id": key[1]}
        places = ["first", "number"]
        found = await self._all(SPAN, {**match, "batch_id": batch_id}, projection=places)
        return BatchEntry(found[0]["first"], found[0]["number"]) if found else None

    async def events(self, after: int, limit: int) -> list[EventRow]:
        if limit == 0:
            return []
        match = {"run": self.run_id, "number": {"$gt": after}}
        found = await self._all(EVENT, match, sort=[("number", 1)], limit=max(limit, 0))
        return [EventRow(one["number"], bytes(one["body"])) for one in found]


async def _aggregated(collection: AsyncCollection[Any], steps: list[Document]) -> list[Document]:
    return await (await collection.aggregate(steps)).to_list()


def _parts(names: list[T], size: int = MANY) -> Iterator[list[T]]:
    for start in range(0, len(names), size):
        yield names[start : start + size]
