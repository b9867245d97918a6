"""The MongoDB journal: the whole contract, ownership, faults of the connection, and messages.

Which server was tested shows in each test's name: `given` (AGL_TEST_MONGO_URL), or `wire-standalone` and `wire-replica-set`, our wire
server over mongomock (tests/mongo_wire.py), which is not a MongoDB server.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import secrets
import signal
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from journal_contract import JournalContract, Storage
from mongo_wire import Mongo, WireServer
from pymongo import MongoClient

from agl_ray.store.journals.base import COLUMNS, Journal, Query, Row, SpanRow
from agl_ray.store.journals.mongo import MongoJournal
from agl_ray.store.journals.settings import PoolSettings
from agl_ray.types import ConfigError, InputError, StoreError

pytestmark = pytest.mark.slow

pytest_plugins = ["mongo_wire"]

LEASE = 0.5


class Runs:
    """Every call is a new run on the same server."""

    def __init__(self, mongo: Mongo) -> None:
        self._mongo, self._numbers, self._name = mongo, itertools.count(), secrets.token_hex(4)

    def __call__(self) -> Callable[[], Journal]:
        run_id = f"{self._name}/{next(self._numbers)}"
        return lambda: MongoJournal(self._mongo.url, run_id, lease_seconds=LEASE)


class TestMongo(JournalContract):
    @pytest.fixture
    def storage(self, mongo: Mongo) -> Storage:
        return Storage(Runs(mongo), examples=20)


def rollout(name: str, created: int = 1) -> Row:
    return Row("rollout", name, 0, (created, "running", None, 1.0, None, None), b"{}")


@pytest.fixture
def make(mongo: Mongo) -> Callable[..., MongoJournal]:
    """A journal of the test's own run; options go to MongoJournal."""
    run_id = f"test-{secrets.token_hex(4)}"
    return lambda **options: MongoJournal(mongo.url, run_id, **{"lease_seconds": LEASE, **options})


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


# Ownership.


def test_a_living_store_is_not_robbed(make: Callable[..., MongoJournal]) -> None:
    async def test() -> None:
        first, second = make(), make()
        await first.open()
        with pytest.raises(
            StoreError, match=rf"another living store .* \(process {os.getpid()} on"
        ):
            await second.open()
        await second.close()
        await first.write([rollout("a")], [])
        await first.close()
        third = make()
        assert (await third.open()).rollouts_by_status == {"running": 1}
        await third.close()

    run(test())


def test_a_store_that_was_replaced_writes_nothing_more(make: Callable[..., MongoJournal]) -> None:
    async def test() -> None:
        first, second = make(), make()
        await first.open()
        await first.write([rollout("a")], [])
        assert first._owner is not None
        assert first._owner._keeper is not None
        first._owner._keeper.cancel()  # as a process that stands still
        await second.open()
        for _ in range(2):
            with pytest.raises(StoreError, match="another store has taken this run over"):
                await first.write([rollout("b")], [SpanRow("s", ("b", "at"), 1, 1, b"x")])
        with pytest.raises(StoreError, match="taken this run over"):
            await first.forget(["a"])
        await second.write([rollout("c")], [])
        assert await second.keys("rollout", "") == ["a", "c"]
        assert await second.payloads([("b", "at")]) == []
        await first.close()
        await second.write([rollout("d")], [])  # the close of the old one has not freed the run
        await second.close()

    run(test())


def hold(url: str, run_id: str, ready: Any) -> None:
    async def main() -> None:
        journal = MongoJournal(url, run_id)
        await journal.open()
        await journal.write([rollout("a")], [])
        ready.set()
        await asyncio.sleep(60)

    asyncio.run(main())


def test_a_killed_store_on_this_machine_is_replaced_at_once(mongo: Mongo) -> None:
    """With the lease of half a minute, only the death of its process can be the reason."""
    context = multiprocessing.get_context("spawn")
    ready, run_id = context.Event(), f"test-{secrets.token_hex(4)}"
    process = context.Process(target=hold, args=(mongo.url, run_id, ready))
    process.start()
    assert ready.wait(60)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)

    async def test() -> None:
        journal = MongoJournal(mongo.url, run_id, lease_seconds=30)
        live = await asyncio.wait_for(journal.open(must_exist=True), 10)
        assert (live.starts, live.rollouts_by_status) == (2, {"running": 1})
        await journal.close()

    try:
        run(test())
    finally:
        process.join()


def test_runs_share_a_database(mongo: Mongo) -> None:
    async def test() -> None:
        names = [f"{secrets.token_hex(4)}{end}" for end in ("", "/a", "%2Fa")]
        names.append(names[0] + "/a/b")
        journals = [MongoJournal(mongo.url, name, lease_seconds=LEASE) for name in names]
        for number, journal in enumerate(journals):
            await journal.open()
            await journal.write([rollout("a/b", number), rollout("b", number)], [])
        for number, journal in enumerate(journals):
            assert [row.columns[0] for row in (await journal.query(Query("rollout"))).rows] == [
                number
            ] * 2
            assert await journal.keys("rollout", "a") == ["a/b"]
            await journal.forget(["b"])
            assert await journal.keys("rollout", "") == ["a/b"]
            await journal.close()

    run(test())


# Content.


def test_large_payloads_are_split_and_forgotten_as_a_whole(
    mongo: Mongo, make: Callable[..., MongoJournal]
) -> None:
    payload = os.urandom(25 * 2**20)

    async def test() -> None:
        journal = make()
        await journal.open()
        span = SpanRow("big", ("a", "at"), 1, 1, payload)
        await journal.write([rollout("a")], [span, SpanRow("small", ("a", "at"), 2, 1, b"x")])
        found = await journal.payloads([("a", "at")])
        assert [one.batch_id for one in found] == ["big", "small"]
        assert found[0] == span
        [totals] = await journal.span_totals(["a"])
        assert totals.size == len(payload) + 1
        with MongoClient(mongo.url) as client:
            chunks = client["agl_ray"]["chunk"]
            assert chunks.count_documents({"run": journal.run_id}) == 3
            await journal.forget(["a"])
            assert chunks.count_documents({"run": journal.run_id}) == 0
        await journal.close()

    run(test())


def test_damaged_payloads_are_store_errors(mongo: Mongo, make: Callable[..., MongoJournal]) -> None:
    async def test() -> None:
        journal = make()
        await journal.open()
        await journal.write([], [SpanRow("s", ("a", "at"), 1, 2, b"payload")])
        with MongoClient(mongo.url) as client:
            client["agl_ray"]["span"].update_one(
                {"run": journal.run_id}, {"$set": {"payload": b"payloaD"}}
            )
        with pytest.raises(StoreError, match="spans 1 to 2 of rollout a are damaged"):
            await journal.payloads([("a", "at")])
        await journal.close()

    run(test())


def test_what_mongodb_cannot_hold_is_refused_before_anything_is_written(
    make: Callable[..., MongoJournal],
) -> None:
    async def test() -> None:
        for bad, error, text in (
            (
                rollout("big")._replace(body=b"x" * (16 * 2**20)),
                StoreError,
                "rollout 'big' has 16777216",
            ),
            (rollout("half\ud800"), InputError, "UTF-8 form"),
        ):
            journal = make()
            await journal.open()
            with pytest.raises(error, match=text):
                await journal.write([rollout("good"), bad], [])
            assert await journal.keys("rollout", "") == []
            await journal.close()

    run(test())


def test_an_older_format_is_not_opened(mongo: Mongo, make: Callable[..., MongoJournal]) -> None:
    async def test() -> None:
        journal = make()
        await journal.open()
        await journal.close()
        with MongoClient(mongo.url) as client:
            owner = client["agl_ray"]["owner"]
            owner.update_one({"_id": journal.run_id}, {"$set": {"span_schema": "older"}})
        with pytest.raises(StoreError, match="span_schema is older, this agl_ray writes"):
            await journal.open()
        await journal.close()

    run(test())


# The connection.


def wire_of(mongo: Mongo) -> WireServer:
    if mongo.wire is None:
        pytest.skip("a server that was given is not broken on purpose")
    return mongo.wire


def test_a_server_that_comes_back_costs_only_waiting(
    mongo: Mongo, make: Callable[..., MongoJournal]
) -> None:
    wire = wire_of(mongo)

    async def test() -> None:
        journal = make(seconds=20, lease_seconds=10)
        await journal.open()
        await journal.write([rollout("a")], [])
        wire.die()
        threading.Timer(1.0, wire.revive).start()
        await journal.write([rollout("b")], [])
        wire.die()
        threading.Timer(1.0, wire.revive).start()
        assert sorted(row.key for row in await journal.rows("rollout", ["a", "b"])) == ["a", "b"]
        await journal.close()

    run(test())


def test_a_server_that_stays_away_is_a_store_error(
    mongo: Mongo, make: Callable[..., MongoJournal]
) -> None:
    wire = wire_of(mongo)

    async def test() -> None:
        journal = make(seconds=1)
        await journal.open()
        wire.die()
        with pytest.raises(StoreError, match=r"store journal mongodb 127.*run 'test-.*write"):
            await journal.write([rollout("a")], [])
        with pytest.raises(StoreError, match="open it again"):
            await journal.write([rollout("a")], [])
        await journal.close()
        again = make(seconds=1)
        with pytest.raises(StoreError, match=r"cannot open it|no answer"):
            await again.open()
        await again.close()

    run(test())


def test_urls_that_cannot_be_read_are_configuration_errors() -> None:
    for url in ("mongodb://", "mysql://x", "mongodb", "mongodb://me:secret@h:99999/?x"):
        with pytest.raises(ConfigError, match=r"store\.url") as caught:
            run(_open(lambda url=url: MongoJournal(url, "r")))
        assert "secret" not in str(caught.value)


def test_a_server_that_is_not_there_is_a_store_error_without_the_password() -> None:
    url = "mongodb://me:secret@127.0.0.1:9/other?serverSelectionTimeoutMS=200"
    expected = r"mongodb 127\.0\.0\.1:9, database 'other', run 'r'.*start the server"
    with pytest.raises(StoreError, match=expected) as lost:
        run(_open(lambda: MongoJournal(url, "r", seconds=3)))
    assert "secret" not in str(lost.value)


async def _open(make: Callable[[], Journal]) -> None:
    journal = make()
    try:
        await journal.open()
    finally:
        await journal.close()


def test_the_pool_has_the_size_of_the_settings(mongo: Mongo) -> None:
    async def test() -> None:
        pool = PoolSettings(size=2, max_overflow=1, timeout=7.0, recycle=60.0)
        journal = MongoJournal(mongo.url, f"test-{secrets.token_hex(4)}", pool)
        await journal.open()
        assert journal._client is not None
        options = journal._client.options.pool_options
        assert (options.max_pool_size, options.wait_queue_timeout) == (3, 7.0)
        assert options.max_idle_time_seconds == 60.0
        keys = [("a", f"at-{i}") for i in range(50)]
        await asyncio.gather(*(journal.payloads([key]) for key in keys))
        await journal.close()

    run(test())


def test_columns_of_every_kind_come_back(make: Callable[..., MongoJournal]) -> None:
    values = {int: 2**53 + 1, str: "x", float: 0.1}

    async def test() -> None:
        journal = make()
        await journal.open()
        rows = [
            Row(kind, "k", 2**40, tuple(values[of] for of in columns.values()), bytes(range(256)))
            for kind, columns in COLUMNS.items()
        ]
        rows += [
            Row(kind, "empty", 0, (None,) * len(columns), b"") for kind, columns in COLUMNS.items()
        ]
        await journal.write(rows, [])
        for kind in COLUMNS:
            found = (await journal.query(Query(kind))).rows
            assert found == [
                row for row in sorted(rows, key=lambda row: row.key) if row.kind == kind
            ]
        await journal.close()

    run(test())
