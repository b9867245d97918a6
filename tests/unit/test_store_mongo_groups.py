"""Writes of the MongoDB journal that are cut off: at every command, before and after it was carried out, all or nothing.

Against our wire server over mongomock (tests/mongo_wire.py), as a standalone and as a replica set: only that one can be broken at will.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from mongo_wire import WireServer

from agl_ray import waits
from agl_ray.store.journals import mongo_groups
from agl_ray.store.journals.base import EventRow, Live, Query, Row, SpanRow
from agl_ray.store.journals.mongo import MongoJournal
from agl_ray.store.journals.mongo_documents import CHUNK_BYTES
from agl_ray.store.journals.mongo_trouble import FAILURES, of_driver
from agl_ray.types import StoreError

pytestmark = pytest.mark.slow


def row(kind: str, key: str, number: int) -> Row:
    columns = {
        "rollout": (number, "running", None, float(number), None, None),
        "attempt": (key.split("/")[0], "at", "running", None, None, 1.0, None),
        "state": (),
    }
    return Row(kind, key, number, columns[kind], str(number).encode())


def group(number: int) -> tuple[list[Row], list[SpanRow], list[EventRow]]:
    """Writes of every kind: changes of what was there, and new things."""
    rows = [row("rollout", key, number) for key in ("a", "b", f"new-{number}")]
    rows += [row("attempt", "a/at", number), row("state", "trainer", number)]
    spans = [
        SpanRow(f"b{number}-{i}", ("a", "at"), 10 * number + i, 1, b"x" * 100) for i in range(3)
    ]
    return rows, spans, [EventRow(number, b"e")]


class Seen:
    """What a store would find: everything of group `number` and before, nothing of later ones, or a mixture."""

    def __init__(self) -> None:
        self.rollouts: dict[str, int] = {}
        self.bodies: set[bytes] = set()
        self.batches: list[str] = []
        self.events: list[int] = []
        self.live: Live = Live()

    async def look(self, journal: MongoJournal) -> Seen:
        rows = (await journal.query(Query("rollout"))).rows
        self.rollouts = {one.key: one.columns[0] for one in rows}
        others = await journal.attempts_of(["a"]) + await journal.rows("state", ["trainer"])
        self.bodies = {
            one.body for one in [*rows, *others] if one.key in ("a", "b", "a/at", "trainer")
        }
        self.batches = [one.batch_id for one in await journal.payloads([("a", "at")])]
        self.events = [one.number for one in await journal.events(0, -1)]
        return self

    def is_group(self, number: int) -> bool:
        new = {f"new-{i}": i for i in range(1, number + 1)}
        return (
            self.rollouts == {"a": number, "b": number, **new}
            and self.bodies == {str(number).encode()}
            and self.batches == [f"b{n}-{i}" for n in range(1, number + 1) for i in range(3)]
            and self.events == list(range(1, number + 1))
            and self.live.num_spans == 3 * number
            and self.live.last_event == number
        )


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


def journal_of(wire: WireServer, run_id: str = "run") -> MongoJournal:
    return MongoJournal(wire.url, run_id, seconds=20, lease_seconds=0.15)


async def mortal(wire: WireServer) -> MongoJournal:
    """A journal with one group, to which every fault from now on is final, and whose commands are only those of its calls: its
    count does not move in between."""
    journal = MongoJournal(wire.url, "run", seconds=20, lease_seconds=60)
    await journal.open()
    await journal.write(*group(1))
    return hasty(journal)


def hasty(journal: MongoJournal) -> MongoJournal:
    """Nothing is tried again."""

    async def persist(doing: str, work: Callable[[], Any], *, seconds: float = 20.0) -> Any:
        try:
            return await waits.wait(of_driver(work()), on=doing, seconds=20)
        except FAILURES as error:
            raise StoreError(f"{doing}: {error}") from error

    journal._server.persist = persist  # type: ignore[method-assign]
    return journal


async def kill(journal: MongoJournal) -> None:
    """Its store is gone without a word: nothing is given back."""
    if journal._owner is not None and journal._owner._keeper is not None:
        journal._owner._ended = True
        journal._owner._keeper.cancel()
        journal._owner = None
    await journal.close()


async def reopened(wire: WireServer) -> tuple[MongoJournal, Seen]:
    journal = journal_of(wire)
    seen = Seen()
    seen.live = await journal.open(must_exist=True)
    return journal, await seen.look(journal)


async def acknowledged(call: Coroutine[Any, Any, Any]) -> bool:
    try:
        await call
    except StoreError:
        return False
    return True


both = pytest.mark.parametrize(
    "replica_set", [False, True], ids=["wire-standalone", "wire-replica-set"]
)
either_way = pytest.mark.parametrize("after", [False, True], ids=["undone", "unanswered"])
Attempt = Callable[[int, WireServer], Coroutine[Any, Any, None]]


def at_every_command(replica_set: bool, most: int, attempt: Attempt) -> None:
    """`attempt(place, wire)` for every place below `most`, each with a server of its own, of which the last is not reached."""

    async def test() -> None:
        few = asyncio.Semaphore(6)

        async def one(place: int) -> bool:
            async with few:
                with WireServer(replica_set=replica_set) as wire:
                    await attempt(place, wire)
                    return wire.deaths > 0

        died = await asyncio.gather(*(one(place) for place in range(most)))
        assert any(died)
        assert not died[-1], "the call has more commands than were tried"

    asyncio.run(test())


@both
@either_way
@pytest.mark.parametrize("size", [CHUNK_BYTES, 1200], ids=["one-part", "many-parts"])
def test_a_write_cut_off_at_any_command_is_there_or_not(
    replica_set: bool, after: bool, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server dies at the k-th command of the second write, for every k; a new store opens when it is back."""
    monkeypatch.setattr(mongo_groups, "CHUNK_BYTES", size)
    outcomes: list[tuple[bool, bool]] = []

    async def attempt(place: int, wire: WireServer) -> None:
        journal = await mortal(wire)
        wire.break_at(place, after=after)
        done = await acknowledged(journal.write(*group(2)))
        await kill(journal)
        wire.revive()
        again, seen = await reopened(wire)
        there = seen.is_group(2)
        assert there or (seen.is_group(1) and not done), (place, vars(seen))
        await again.write(*group(3 if there else 2))
        await again.close()
        last, seen = await reopened(wire)
        assert seen.is_group(3 if there else 2), (place, vars(seen))
        await last.close()
        outcomes.append((done, there))

    at_every_command(replica_set, 16, attempt)
    assert {(True, True), (False, False)} <= set(outcomes)


@both
@either_way
def test_a_forget_cut_off_is_done_or_not(replica_set: bool, after: bool) -> None:
    async def attempt(place: int, wire: WireServer) -> None:
        journal = await mortal(wire)
        wire.break_at(place, after=after)
        done = await acknowledged(journal.forget(["a"]))
        await kill(journal)
        wire.revive()
        again, seen = await reopened(wire)
        gone = "a" not in seen.rollouts
        assert gone or not done
        assert bool(seen.batches) != gone
        assert bool(await again.attempts_of(["a"])) != gone
        assert seen.live.num_spans == (0 if gone else 3)
        await again.close()

    at_every_command(replica_set, 10, attempt)


@both
@either_way
def test_an_opening_cut_off_can_be_repeated(replica_set: bool, after: bool) -> None:
    """Dies while it finishes the write that died before."""

    async def attempt(place: int, wire: WireServer) -> None:
        journal = await mortal(wire)
        wire.break_at(3, after=True)
        done = await acknowledged(journal.write(*group(2)))
        await kill(journal)
        wire.revive()
        wire.deaths = 0
        journal = hasty(journal_of(wire))
        wire.break_at(place, after=after)
        await acknowledged(journal.open())
        await kill(journal)
        wire.revive()
        again, seen = await reopened(wire)
        assert seen.is_group(2) or (seen.is_group(1) and not done), (place, vars(seen))
        await again.close()

    at_every_command(replica_set, 60, attempt)


@both
@either_way
def test_a_server_that_dies_and_comes_back_meanwhile_doubles_nothing(
    replica_set: bool, after: bool
) -> None:
    """The same journal goes on by itself: what was carried out and not answered is done a second time, harmlessly."""

    async def attempt(place: int, wire: WireServer) -> None:
        journal = journal_of(wire)
        await journal.open()
        await journal.write(*group(1))
        wire.break_at(place, after=after)
        reviving = asyncio.ensure_future(_revive_when_dead(wire))
        await journal.write(*group(2))
        wire.break_at(1000, after=False)
        await journal.write(*group(3))
        reviving.cancel()
        await journal.close()
        again, seen = await reopened(wire)
        assert seen.is_group(3), (place, after, vars(seen))
        await again.close()

    at_every_command(replica_set, 14, attempt)


async def _revive_when_dead(wire: WireServer) -> None:
    while True:
        await asyncio.sleep(0.1)
        if wire.dead:
            wire.revive()


def test_a_store_that_comes_late_changes_nothing() -> None:
    """Replaced between its commit and its last step, it puts old documents over new ones in vain."""

    async def test() -> None:
        with WireServer(replica_set=False) as wire:
            old = journal_of(wire)
            await old.open()
            await old.write(*group(1))
            groups = old._groups
            assert groups is not None
            assert old._owner is not None
            assert old._owner._keeper is not None
            old._owner._keeper.cancel()
            late = asyncio.Event()
            apply = groups._apply

            async def slow(what: Any, number: int) -> None:
                await late.wait()
                await apply(what, number)

            groups._apply = slow  # type: ignore[method-assign]
            writing = asyncio.ensure_future(old.write(*group(2)))
            await asyncio.sleep(0.1)
            new, seen = await reopened(wire)
            assert seen.is_group(2), "its commit had happened"
            await new.write(*group(3))
            late.set()
            await writing
            with pytest.raises(StoreError, match="taken this run over"):
                await old.write(*group(4))
            await new.close()
            again, seen = await reopened(wire)
            assert seen.is_group(3), vars(seen)
            await again.close()
            await old.close()

    run(test())


@both
def test_deaths_in_any_order(replica_set: bool) -> None:
    """Histories of stores that die, each at a random command of a life of an opening and three writes."""

    async def history(seed: int) -> None:
        chance = random.Random(seed)
        with WireServer(replica_set=replica_set) as wire:
            number = 0
            for life in range(4):
                journal = hasty(journal_of(wire)) if life else journal_of(wire)
                place = chance.randrange(20, 60) if life else 1000
                wire.break_at(place, after=chance.random() < 0.5)
                said = number
                with contextlib.suppress(StoreError):
                    await journal.open()
                    for following in range(number + 1, number + 4):
                        await journal.write(*group(following))
                        said = following
                await kill(journal)
                wire.revive()
                again, seen = await reopened(wire)
                number = max(seen.rollouts.values(), default=0)
                assert said <= number <= said + 1
                assert seen.is_group(number), (seed, life, vars(seen))
                await again.close()

    async def test() -> None:
        await asyncio.gather(*(history(seed) for seed in range(8)))

    run(test())


def test_parts_of_many_sizes_come_back_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group larger than a document, written and finished by the next store."""

    async def test() -> None:
        with WireServer(replica_set=False) as wire:
            journal = journal_of(wire)
            await journal.open()
            payload = os.urandom(30 * 2**20)
            small = [SpanRow(f"s{i}", ("a", "at"), 2 + i, 1, os.urandom(2**20)) for i in range(20)]
            groups = journal._groups
            assert groups is not None

            async def never(what: Any, number: int) -> None:
                raise StoreError("killed")

            groups._apply = never  # type: ignore[method-assign]
            spans = [SpanRow("big", ("a", "at"), 1, 1, payload), *small]
            with pytest.raises(StoreError, match="killed"):
                await journal.write([row("rollout", "a", 1)], spans)
            await journal.close()
            again, _ = await reopened(wire)
            assert await again.payloads([("a", "at")]) == spans
            await again.close()

    run(test())
