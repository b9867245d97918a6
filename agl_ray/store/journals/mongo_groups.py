"""One write of the MongoDB journal: all of it or nothing, on a replica set and on a server without transactions.

What it is: `Groups`. Every write is a group with the next number. On a replica set (or mongos) it is one transaction, which also compares
the owner's token and sets the owner's `group`. Elsewhere it has three steps, each safe to repeat:
1. the documents are noted in `redo` (parts below the size of a document, named by token and place);
2. the owner's document gets the group's number and its parts, on condition that the token is still ours: from here on the
   write has happened, and before it nothing has; a single document is written as a whole by every MongoDB;
3. the documents are put into their collections. A document with the same or a higher group is left alone, so that a step that
   is repeated, or comes late from a store that was replaced, changes nothing.
A store that opens repeats step 3 of the last group, if its parts are whole (the next group overwrites them only after step 3). What
was answered is there then, what was not is there entirely or not at all. Readers of the store are kept out during step 3.
Without transactions everything is written twice: a server for development, not for a long run.
Who calls it: `agl_ray.store.journals.mongo`. Test alone: tests/unit/test_store_mongo_groups.py (a write cut off at every step).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from bson import Binary, decode, encode
from pymongo import AsyncMongoClient, DeleteMany, ReplaceOne, UpdateOne
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import BulkWriteError, OperationFailure

from agl_ray.store.journals.mongo_documents import (
    CHUNK,
    CHUNK_BYTES,
    EVENT,
    OWNER,
    PERMANENT,
    REDO,
    SPAN,
    Document,
    Put,
    scope,
)
from agl_ray.store.journals.mongo_gate import Gate
from agl_ray.store.journals.mongo_owner import Ownership
from agl_ray.store.journals.mongo_trouble import Server
from agl_ray.types import StoreError

PLACE_BYTES = 512  # of a document beside its body or payload
DUPLICATE = 11000
# Illegal operation (a standalone), unknown command or option, and what stand-ins for MongoDB answer.
_NO_TRANSACTIONS = {20, 59, 72, 238, 263, 303}


class Group(NamedTuple):
    """What one write does. `last_event`: the highest number of an event so far, also of forgotten ones."""

    puts: Sequence[Put] = ()
    forget: Sequence[str] = ()  # rollout ids
    drop_events: int = 0  # up to this number
    last_event: int = 0


class Groups:
    """Writes one group after the other. `open` first."""

    def __init__(
        self,
        client: AsyncMongoClient[Any],
        database: str,
        server: Server,
        owner: Ownership,
        gate: Gate,
    ) -> None:
        self._client, self._server, self._owner, self._gate = client, server, owner, gate
        self._database = client[database]
        self._run_id = server.run_id
        self.transactions = False
        self.group = 0  # number of the last write
        self.last_event = 0

    async def open(self, owned: Document) -> None:
        """Finish the write that the last store may have left half done. `owned`: the owner's document."""
        self.group, self.last_event = owned["group"], owned["last_event"]
        self.transactions = await self._server.persist("ask it for transactions", self._probe)
        await self._server.persist("finish its last write", lambda: self._recover(owned))

    async def _probe(self) -> bool:
        hello = await self._client.admin.command("hello")
        if "setName" not in hello and hello.get("msg") != "isdbgrid":
            return False

        try:
            async with self._transaction() as session:
                await self._database[OWNER].find_one({"_id": self._run_id}, session=session)
        except OperationFailure as error:
            if error.code not in _NO_TRANSACTIONS:
                raise
            return False
        return True

    async def _recover(self, owned: Document) -> None:
        names = self._part_names(owned["redo"], owned["parts"])
        parts = [part async for part in self._database[REDO].find({"_id": {"$in": names}})]
        if names and [part["group"] for part in parts] == [owned["group"]] * len(names):
            parts.sort(key=lambda part: int(part["part"]))
            await self._apply(_joined(parts), owned["group"])
        await self._database[OWNER].update_one(self._owner.condition, {"$set": {"parts": 0}})
        await self._database[REDO].delete_many({"run": self._run_id})

    # Writing.

    async def write(self, doing: str, make: Callable[[int], Group]) -> None:
        """The group that `make` gives for its number. It has happened, as a whole, on return."""
        owner = self._owner
        async with owner.turn:
            owner.must_be_ours()
            number = self.group + 1
            group = make(number)
            group = group._replace(last_event=max(self.last_event, group.last_event))
            try:
                await self._write(doing, group, number)
            except BaseException as error:
                # Whether it has happened is not known: its number must not be used for something else.
                owner.lost = owner.lost or StoreError(
                    f"{self._server.name}: an earlier write failed ({error}); open it again"
                )
                raise
            self.group, self.last_event = number, group.last_event

    async def _write(self, doing: str, group: Group, number: int) -> None:
        if self.transactions:
            async with self._gate.alone():
                await self._server.persist(doing, lambda: self._transact(group, number))
            return
        await self._server.persist(doing, lambda: self._commit(group, number))
        async with self._gate.alone():
            await self._server.persist(doing, lambda: self._apply(group, number))

    async def _transact(self, group: Group, number: int) -> None:
        async with self._transaction() as session:
            changed = {"group": number, "parts": 0, "last_event": group.last_event}
            before = await self._database[OWNER].find_one_and_update(
                self._owner.condition, {"$set": changed, "$inc": {"beat": 1}}, session=session
            )
            if before is not None and before["group"] < number:  # else the answer was lost
                for name, writes in _writes(self._run_id, group, None).items():
                    await self._database[name].bulk_write(writes, ordered=True, session=session)
        if before is None:
            raise await self._owner.lose()

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[AsyncClientSession]:
        """Committed at its end. Not the driver's `with_transaction`: that one goes on for two minutes, whatever our deadline is."""
        async with self._client.start_session() as session, await session.start_transaction():
            yield session

    async def _commit(self, group: Group, number: int) -> None:
        """Steps 1 and 2."""
        parts = list(_parts(group))
        names = self._part_names(self._owner.token, len(parts))
        common = {"run": self._run_id, "token": self._owner.token, "group": number}
        for place, (name, part) in enumerate(zip(names, parts, strict=True)):
            await self._database[REDO].replace_one(
                {"_id": name}, {"_id": name, **common, "part": place, "data": part}, upsert=True
            )
        changed = {"group": number, "parts": len(parts), "redo": self._owner.token}
        done = await self._database[OWNER].update_one(
            self._owner.condition,
            {"$set": {**changed, "last_event": group.last_event}, "$inc": {"beat": 1}},
        )
        if not done.matched_count:
            raise await self._owner.lose()

    async def _apply(self, group: Group, number: int) -> None:
        """Step 3."""
        for name, writes in _writes(self._run_id, group, number).items():
            try:
                await self._database[name].bulk_write(writes, ordered=False)
            except BulkWriteError as error:
                others = [one for one in error.details["writeErrors"] if one["code"] != DUPLICATE]
                if others or error.details.get("writeConcernErrors"):
                    raise
                # The rest has a document of this group or a later one, whose `_id` was refused twice.

    def _part_names(self, token: str | None, number: int) -> list[str]:
        return [f"{scope(self._run_id)}{token}/{place}" for place in range(number)]


def _writes(
    run_id: str, group: Group, number: int | None
) -> Mapping[str, list[ReplaceOne[Any] | UpdateOne | DeleteMany]]:
    """Per collection what is to be done. number: leave documents of this group and later ones alone; None: a transaction guards."""
    writes: dict[str, list[ReplaceOne[Any] | UpdateOne | DeleteMany]] = {}
    for collection, document in group.puts:
        of = writes.setdefault(collection, [])
        name: Document = {"_id": document["_id"]}
        if collection in PERMANENT:
            of.append(UpdateOne(name, {"$setOnInsert": document}, upsert=True))
        else:
            guard = {} if number is None else {"group": {"$lt": number}}
            of.append(ReplaceOne({**name, **guard}, document, upsert=True))
    if group.forget:
        ids = list(group.forget)
        for collection in ("attempt", SPAN, CHUNK):
            gone = DeleteMany({"run": run_id, "rollout_id": {"$in": ids}})
            writes.setdefault(collection, []).append(gone)
        keys = {"$in": [scope(run_id) + key for key in ids]}
        writes.setdefault("rollout", []).append(DeleteMany({"_id": keys}))
    if group.drop_events:
        old = {"run": run_id, "number": {"$lte": group.drop_events}}
        writes.setdefault(EVENT, []).append(DeleteMany(old))
    return writes


def _parts(group: Group) -> Iterator[Binary]:
    """A group as BSON in pieces that fit into documents; at least one."""
    entries: list[Document] = []
    size = 0
    for collection, document in group.puts:
        more = len(document.get("body", b"")) + len(document.get("payload", b"")) + PLACE_BYTES
        if entries and size + more > CHUNK_BYTES:
            yield Binary(encode({"puts": entries}))
            entries, size = [], 0
        entries.append({"in": collection, "document": document})
        size += more
    rest = {"forget": list(group.forget), "drop_events": group.drop_events}
    yield Binary(encode({"puts": entries, **rest, "last_event": group.last_event}))


def _joined(parts: Sequence[Document]) -> Group:
    """The group of these parts, in order."""
    pieces = [decode(part["data"]) for part in parts]
    last = pieces[-1]
    return Group(
        [(one["in"], one["document"]) for piece in pieces for one in piece["puts"]],
        last["forget"],
        last["drop_events"],
        last["last_event"],
    )
