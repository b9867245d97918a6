"""MongoDB for tests: the server that AGL_TEST_MONGO_URL names, or a small one of our own over mongomock.

What it is: `WireServer`, which speaks MongoDB's wire protocol (OP_MSG, and OP_QUERY for the first hello) on a local TCP port. The driver, its
pool, its sessions and transactions, BSON and sockets are the real ones; what the commands mean is mongomock's, and a
transaction is a lock over everything with an undo list. It is NOT a MongoDB server: what was tested against it was not tested against
one. `replica_set=True` says it is a primary of one member (so clients use transactions), otherwise a standalone.
For faults: `break_at(k, after=...)` lets it die at the k-th command from now, before or after carrying it out; `revive()`.
A test module says `pytest_plugins = ["mongo_wire"]` and uses the fixture `mongo`; the test's name shows which server it was. Used by
tests/unit/test_store_mongo*.py.
"""

from __future__ import annotations

import os
import socket
import socketserver
import struct
import threading
from collections.abc import Callable, Iterator
from copy import deepcopy
from datetime import UTC, datetime
from typing import Any, NamedTuple

import bson
import mongomock
import pytest
from mongomock.filtering import filter_applies
from pymongo.errors import PyMongoError

VARIABLE = "AGL_TEST_MONGO_URL"
OP_REPLY, OP_QUERY, OP_MSG = 1, 2004, 2013
MOST_BYTES = 48_000_000
BATCH_BYTES = 16_000_000

Document = dict[str, Any]


class Failed(Exception):
    """A command that is answered with an error."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Died(Exception):
    """The server is dead: nothing is answered."""


class WireServer:
    """Use it as a context manager; `url` is its address. Data live as long as the object."""

    def __init__(self, *, replica_set: bool) -> None:
        self.replica_set = replica_set
        self.data: Any = mongomock.MongoClient()
        self.commands: list[str] = []  # of everybody, without handshakes
        self._lock = threading.Condition()
        self._transaction: Transaction | None = None
        self._cursors: dict[int, tuple[str, list[Document]]] = {}
        self._next_cursor = 1
        self._sockets: set[socket.socket] = set()
        self._countdown: int | None = None
        self._after = False
        self._dead = False
        self.deaths = 0
        self._server = Listener(("127.0.0.1", 0), self)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.01,), daemon=True
        )

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    @property
    def url(self) -> str:
        return f"mongodb://{self.address}/?serverSelectionTimeoutMS=300&connectTimeoutMS=5000"

    def __enter__(self) -> WireServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self.die()
        self._thread.join()

    # Faults.

    def break_at(self, number: int, *, after: bool) -> None:
        """Die at the `number`-th command from now (0: the next), before it is carried out or after."""
        with self._lock:
            self._countdown, self._after = number, after

    def die(self) -> None:
        with self._lock:
            self._dead = True
            self.deaths += 1
            if self._transaction is not None:
                self._end_transaction(commit=False)
            for one in self._sockets:
                _shut(one)
            self._lock.notify_all()

    def revive(self) -> None:
        with self._lock:
            self._dead, self._countdown = False, None
            self.commands.clear()

    @property
    def dead(self) -> bool:
        return self._dead

    # Commands.

    def answer(self, command: Document, connection: socket.socket) -> Document:
        """The reply's document. Died: none."""
        name = next(iter(command))
        if name in HANDSHAKES:
            if self._dead:
                raise Died
            return self._hello() if name != "ping" else {"ok": 1.0}
        with self._lock:
            after = self._count(name)
            try:
                self._take_turn(name, command, connection)
                reply = {**self._carry_out(name, command), "ok": 1.0}
            except Failed as error:
                reply = {"ok": 0.0, "code": error.code, "errmsg": str(error)}
            if after:
                self.die()
                raise Died
            return reply

    def _count(self, name: str) -> bool:
        """Whether to die when this one is done."""
        if self._dead:
            raise Died
        self.commands.append(name)
        if self._countdown is None:
            return False
        self._countdown -= 1
        if self._countdown >= 0:
            return False
        if not self._after:
            self.die()
            raise Died
        return True

    def _take_turn(self, name: str, command: Document, connection: socket.socket) -> None:
        """Wait while another session is in a transaction; begin, or go on with, one's own."""
        session = command.get("lsid", {}).get("id")
        mine = (session, command.get("txnNumber")) if "autocommit" in command else None
        if mine is not None and not self.replica_set:
            raise Failed(
                20, "Transaction numbers are only allowed on a replica set member or mongos"
            )
        while self._transaction is not None and self._transaction.of != mine:
            if not self._lock.wait(timeout=10):
                raise Failed(
                    112, "WriteConflict: a transaction of another session stands in the way"
                )
            if self._dead:
                raise Died
        if mine is None:
            return
        if command.get("startTransaction"):
            self._transaction = Transaction(mine, connection, {})
        elif self._transaction is None and name != "abortTransaction":
            committed = name == "commitTransaction" and mine in self._committed
            if not committed:
                raise Failed(251, "NoSuchTransaction: it was not started, or has been aborted")

    _committed: set[Any] = set()

    def _carry_out(self, name: str, command: Document) -> Document:
        if name in ("commitTransaction", "abortTransaction"):
            if self._transaction is not None:
                self._end_transaction(commit=name == "commitTransaction")
            return {}
        handler: Callable[[WireServer, Any, Document], Document] | None = HANDLERS.get(name)
        if handler is None:
            raise Failed(59, f"no such command: {name!r}")
        collection = None
        database = self.data[command["$db"]]
        if isinstance(command[name], str):
            collection = database[command[name]]
            if self._transaction is not None and name in WRITING:
                self._transaction.keep(collection)
        try:
            return handler(self, collection, command)
        except NotImplementedError as error:
            raise Failed(238, f"mongomock: {error}") from error
        except (PyMongoError, mongomock.PyMongoError) as error:
            raise Failed(getattr(error, "code", None) or 2, str(error)) from error

    def _end_transaction(self, *, commit: bool) -> None:
        assert self._transaction is not None
        if commit:
            self._committed.add(self._transaction.of)
        else:
            self._transaction.undo()
        self._transaction = None
        self._lock.notify_all()

    def _hello(self) -> Document:
        of_set = {
            "setName": "rs0",
            "setVersion": 1,
            "secondary": False,
            "hosts": [self.address],
            "primary": self.address,
            "me": self.address,
        }
        return {
            "helloOk": True,
            "isWritablePrimary": True,
            "ismaster": True,
            "maxBsonObjectSize": 16 * 2**20,
            "maxMessageSizeBytes": MOST_BYTES,
            "maxWriteBatchSize": 100_000,
            "localTime": datetime.now(UTC),
            "minWireVersion": 0,
            "maxWireVersion": 21,
            "logicalSessionTimeoutMinutes": 30,
            "readOnly": False,
            **(of_set if self.replica_set else {}),
            "ok": 1.0,
        }

    # Cursors.

    def first_batch(self, collection: Any, command: Document, found: list[Document]) -> Document:
        asked = command.get("cursor", command).get("batchSize", 101)
        single = command.get("singleBatch", False)
        batch, rest = _batch(found, asked)
        number = 0
        if rest and not single:
            number, self._next_cursor = self._next_cursor, self._next_cursor + 1
            self._cursors[number] = (collection.name, rest)
        name = f"{command['$db']}.{collection.name}"
        return {"cursor": {"id": bson.Int64(number), "ns": name, "firstBatch": batch}}

    def next_batch(self, command: Document) -> Document:
        number = int(command["getMore"])
        if number not in self._cursors:
            raise Failed(43, f"cursor id {number} not found")
        collection, rest = self._cursors.pop(number)
        batch, rest = _batch(rest, command.get("batchSize", len(rest)))
        if rest:
            self._cursors[number] = (collection, rest)
        name = f"{command['$db']}.{collection}"
        left = bson.Int64(number if rest else 0)
        return {"cursor": {"id": left, "ns": name, "nextBatch": batch}}

    # Connections.

    def joined(self, connection: socket.socket) -> None:
        with self._lock:
            self._sockets.add(connection)

    def left(self, connection: socket.socket) -> None:
        with self._lock:
            self._sockets.discard(connection)
            if self._transaction is not None and self._transaction.connection is connection:
                self._end_transaction(commit=False)


class Transaction(NamedTuple):
    """`kept`: what collections held before."""

    of: Any
    connection: socket.socket
    kept: dict[str, tuple[Any, list[Document]]]

    def keep(self, collection: Any) -> None:
        if collection.full_name not in self.kept:
            self.kept[collection.full_name] = (collection, deepcopy(list(collection.find())))

    def undo(self) -> None:
        for collection, documents in self.kept.values():
            collection.delete_many({})
            if documents:
                collection.insert_many(documents)


def _batch(found: list[Document], asked: int) -> tuple[list[Document], list[Document]]:
    """At most `asked` documents and about BATCH_BYTES, at least one; the rest."""
    size, end = 0, 0
    for document in found[:asked]:
        size += len(bson.encode(document))
        if end and size > BATCH_BYTES:
            break
        end += 1
    return found[:end], found[end:]


# mongomock looks at every document for every question. By `_id` it need not: thousands of writes would take minutes.

_all_documents = mongomock.Collection._iter_documents


def _iter_documents(self: Any, filter: Document) -> Any:
    wanted = filter.get("_id") if isinstance(filter, dict) else None
    if isinstance(wanted, dict) and list(wanted) == ["$in"]:
        names = list(dict.fromkeys(wanted["$in"]))
        rest = {key: value for key, value in filter.items() if key != "_id"}
    elif isinstance(wanted, str):
        names, rest = [wanted], filter
    else:
        return _all_documents(self, filter)
    there = [self._store[name] for name in names if name in self._store]
    return (one for one in there if filter_applies(rest, one))


mongomock.Collection._iter_documents = _iter_documents


# What the commands do.


def _write_errors(work: Callable[[Any], None], items: list[Any], ordered: bool) -> Document:
    errors: list[Document] = []
    for index, item in enumerate(items):
        try:
            work(item)
        except (mongomock.DuplicateKeyError, mongomock.WriteError) as error:
            code = 11000 if isinstance(error, mongomock.DuplicateKeyError) else 2
            errors.append({"index": index, "code": code, "errmsg": str(error)})
            if ordered:
                break
    return {"writeErrors": errors} if errors else {}


def _insert(server: WireServer, collection: Any, command: Document) -> Document:
    number = 0

    def one(document: Document) -> None:
        nonlocal number
        _small(document)
        collection.insert_one(document)
        number += 1

    errors = _write_errors(one, command["documents"], command.get("ordered", True))
    return {"n": number, **errors}


def _small(document: Document) -> None:
    if len(bson.encode(document)) > 16 * 2**20:
        raise Failed(10334, "BSONObj size is too large")


def _update(server: WireServer, collection: Any, command: Document) -> Document:
    number, changed, upserted = 0, 0, []

    def one(item: tuple[int, Document]) -> None:
        nonlocal number, changed
        index, update = item
        change, upsert = update["u"], update.get("upsert", False)
        _small(change)
        if not next(iter(change), "").startswith("$"):
            done = collection.replace_one(update["q"], change, upsert=upsert)
        elif update.get("multi"):
            done = collection.update_many(update["q"], change, upsert=upsert)
        else:
            done = collection.update_one(update["q"], change, upsert=upsert)
        if done.upserted_id is not None:
            upserted.append({"index": index, "_id": done.upserted_id})
            number += 1
        else:
            number += done.matched_count
            changed += done.modified_count

    items = list(enumerate(command["updates"]))
    errors = _write_errors(one, items, command.get("ordered", True))
    more = {"upserted": upserted} if upserted else {}
    return {"n": number, "nModified": changed, **more, **errors}


def _delete(server: WireServer, collection: Any, command: Document) -> Document:
    number = 0
    for item in command["deletes"]:
        delete = collection.delete_one if item.get("limit") else collection.delete_many
        number += delete(item["q"]).deleted_count
    return {"n": number}


def _find(server: WireServer, collection: Any, command: Document) -> Document:
    found = collection.find(command.get("filter", {}), command.get("projection") or None)
    if command.get("sort"):
        found = found.sort(list(command["sort"].items()))
    found = found.skip(command.get("skip", 0)).limit(command.get("limit", 0))
    return server.first_batch(collection, command, list(found))


def _aggregate(server: WireServer, collection: Any, command: Document) -> Document:
    return server.first_batch(collection, command, list(collection.aggregate(command["pipeline"])))


def _find_and_modify(server: WireServer, collection: Any, command: Document) -> Document:
    if command.get("remove"):
        raise Failed(238, "findAndModify with remove")
    value = collection.find_one_and_update(
        command["query"],
        command["update"],
        upsert=command.get("upsert", False),
        return_document=command.get("new", False),
    )
    there = value is not None
    return {"value": value, "lastErrorObject": {"n": int(there), "updatedExisting": there}}


def _create_indexes(server: WireServer, collection: Any, command: Document) -> Document:
    for index in command["indexes"]:
        collection.create_index(list(index["key"].items()), unique=index.get("unique", False))
    return {"numIndexesAfter": len(collection.index_information())}


def _get_more(server: WireServer, collection: Any, command: Document) -> Document:
    return server.next_batch(command)


def _nothing(server: WireServer, collection: Any, command: Document) -> Document:
    return {}


def _drop_database(server: WireServer, collection: Any, command: Document) -> Document:
    server.data.drop_database(command["$db"])
    return {}


HANDSHAKES = ("hello", "isMaster", "ismaster", "ping", "buildInfo")
HANDLERS: dict[str, Callable[[WireServer, Any, Document], Document]] = {
    "insert": _insert,
    "update": _update,
    "delete": _delete,
    "find": _find,
    "aggregate": _aggregate,
    "findAndModify": _find_and_modify,
    "createIndexes": _create_indexes,
    "getMore": _get_more,
    "killCursors": _nothing,
    "endSessions": _nothing,
    "dropDatabase": _drop_database,
}
WRITING = ("insert", "update", "delete", "findAndModify")


# The wire.


class Listener(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 50

    def __init__(self, address: tuple[str, int], server: WireServer) -> None:
        super().__init__(address, Connection)
        self.wire = server


class Connection(socketserver.BaseRequestHandler):
    server: Listener

    def handle(self) -> None:
        wire: WireServer = self.server.wire
        if wire.dead:
            return
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wire.joined(self.request)
        try:
            while True:
                self._one(wire)
        except (Died, OSError, EOFError):
            return
        finally:
            wire.left(self.request)

    def _one(self, wire: WireServer) -> None:
        length, request_id, _, code = struct.unpack("<iiii", self._exactly(16))
        body = self._exactly(length - 16)
        if code == OP_QUERY:
            end = body.index(b"\0", 4)
            command = bson.decode(body[end + 9 :])
            reply = struct.pack("<iqii", 8, 0, 0, 1) + bson.encode(
                wire.answer(command, self.request)
            )
            self._send(request_id, OP_REPLY, reply)
            return
        assert code == OP_MSG, f"opcode {code}"
        command, more_to_come = _message(body)
        answer = wire.answer(command, self.request)
        if not more_to_come:
            self._send(request_id, OP_MSG, struct.pack("<iB", 0, 0) + bson.encode(answer))

    def _send(self, request_id: int, code: int, body: bytes) -> None:
        self.request.sendall(struct.pack("<iiii", len(body) + 16, 0, request_id, code) + body)

    def _exactly(self, size: int) -> bytes:
        parts = []
        while size:
            part = self.request.recv(min(size, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def _message(body: bytes) -> tuple[Document, bool]:
    """The command of an OP_MSG, document sequences put in, and whether no answer is wanted."""
    (flags,) = struct.unpack_from("<I", body)
    end = len(body) - (4 if flags & 1 else 0)
    at, command, lists = 4, {}, {}
    while at < end:
        kind, at = body[at], at + 1
        (size,) = struct.unpack_from("<i", body, at)
        if kind == 0:
            command = bson.decode(body[at : at + size])
        else:
            name_end = body.index(b"\0", at + 4)
            lists[body[at + 4 : name_end].decode()] = bson.decode_all(
                body[name_end + 1 : at + size]
            )
        at += size
    return {**command, **lists}, bool(flags & 2)


def _shut(one: socket.socket) -> None:
    try:
        one.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it was closed already


# Fixtures.


class Mongo(NamedTuple):
    """A server for a test. `wire`: ours, which can be broken; None where AGL_TEST_MONGO_URL names one."""

    url: str
    wire: WireServer | None


def servers() -> list[str]:
    return ["given"] if os.environ.get(VARIABLE) else ["wire-standalone", "wire-replica-set"]


@pytest.fixture(params=servers())
def mongo(request: pytest.FixtureRequest) -> Iterator[Mongo]:
    """Each server in turn: `given` (AGL_TEST_MONGO_URL), or ours as a standalone and as a replica set."""
    if request.param == "given":
        yield Mongo(os.environ[VARIABLE], None)
        return
    with WireServer(replica_set=request.param == "wire-replica-set") as wire:
        yield Mongo(wire.url, wire)
