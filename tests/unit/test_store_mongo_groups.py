"""Writes of the MongoDB journal that are cut off: at every command, before and after it was carried out, all or nothing.

Against our wire server over mongomock (tests/mongo_wire.py), as a standalone and as a replica set: only that one can be broken at will.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mongo_wire import WireServer

from agl_ray.store.journals import mongo_groups, mongo_trouble
from agl_ray.store.journals.base import EventRow, Live, Query, Row, SpanRow
from agl_ray.store.journals.mongo import MongoJournal
from agl_ray.store.journals.mongo_documents import CHUNK_BYTES
from agl_ray.types import StoreError


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


@pytest.fixture(params=[False, True], ids=["wire-standalone", "wire-replica-set"])
def wire(request: pytest.FixtureRequest) -> Iterator[WireServer]:
    with WireServer(replica_set=request.param) as server:
        yield server


def journal_of(wire: WireServer, run_id: str, seconds: float = 20.0) -> MongoJournal:
    return MongoJournal(wire.url, run_id, seconds=seconds, lease_seconds=0.2)


def mortal(wire: WireServer, run_id: str, monkeypatch: pytest.MonkeyPatch) -> MongoJournal:
    """A journal that gives up at the first fault (the driver itself repeats transactions for a while)."""
    monkeypatch.setattr(mongo_trouble, "_passes", lambda error: False)
    return journal_of(wire, run_id, seconds=1.0 if wire.replica_set else 20.0)


async def kill(journal: MongoJournal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its store is gone without a word: nothing is given back."""
    if journal._owner is not None and journal._owner._keeper is not None:
        journal._owner._ended = True
        journal._owner._keeper.cancel()
        journal._owner = None
    await journal.close()
    monkeypatch.undo()


async def reopened(wire: WireServer, run_id: str) -> tuple[MongoJournal, Seen]:
    journal = journal_of(wire, run_id)
    seen = Seen()
    seen.live = await journal.open(must_exist=True)
    return journal, await seen.look(journal)


@pytest.mark.parametrize("small_parts", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_a_write_cut_off_at_any_command_is_there_or_not(
    wire: WireServer, after: bool, small_parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server dies at the k-th command of the second write, for every k; a new store opens when it is back."""
    size = 1200 if small_parts else CHUNK_BYTES
    outcomes: list[tuple[bool, bool]] = []

    async def test() -> None:
        for place in range(100):
            run_id = secrets.token_hex(4)
            journal = mortal(wire, run_id, monkeypatch)
            monkeypatch.setattr(mongo_groups, "CHUNK_BYTES", size)
            await journal.open()
            await journal.write(*group(1))
            wire.break_at(place, after=after)
            try:
                await journal.write(*group(2))
                acknowledged = True
            except StoreError:
                acknowledged = False
            reached = wire.dead
            await kill(journal, monkeypatch)
            wire.revive()
            again, seen = await reopened(wire, run_id)
            assert seen.is_group(2) or (seen.is_group(1) and not acknowledged), (place, vars(seen))
            outcomes.append((acknowledged, seen.is_group(2)))
            await again.write(*group(2 if seen.is_group(1) else 3))
            await again.close()
            last, seen = await reopened(wire, run_id)
            assert seen.is_group(3 if outcomes[-1][1] else 2)
            await last.close()
            if not reached:
                return
        raise AssertionError("the write has no end")

    run(test())
    assert outcomes[-1] == (True, True), "no fault was left to come"
    assert len(outcomes) >= 4, outcomes
    assert (False, False) in outcomes


def test_a_server_that_dies_and_comes_back_meanwhile_doubles_nothing(wire: WireServer) -> None:
    """The same journal goes on by itself: what was carried out and not answered is done a second time, harmlessly."""

    async def test() -> None:
        for place in range(8):
            for after in (False, True):
                run_id = secrets.token_hex(4)
                journal = journal_of(wire, run_id, seconds=20)
                await journal.open()
                await journal.write(*group(1))
                wire.break_at(place, after=after)
                asyncio.get_running_loop().call_later(0.3, wire.revive)
                await journal.write(*group(2))
                await asyncio.sleep(0.35)  # until it has been revived, also where it never died
                await journal.write(*group(3))
                await journal.close()
                again, seen = await reopened(wire, run_id)
                assert seen.is_group(3), (place, after, vars(seen))
                await again.close()

    run(test())


@pytest.mark.parametrize("after", [False, True])
def test_a_forget_cut_off_is_done_or_not(
    wire: WireServer, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        for place in range(100):
            run_id = secrets.token_hex(4)
            journal = mortal(wire, run_id, monkeypatch)
            await journal.open()
            await journal.write(*group(1))
            wire.break_at(place, after=after)
            try:
                await journal.forget(["a"])
                acknowledged = True
            except StoreError:
                acknowledged = False
            reached = wire.dead
            await kill(journal, monkeypatch)
            wire.revive()
            again, seen = await reopened(wire, run_id)
            gone = "a" not in seen.rollouts
            assert gone or not acknowledged
            assert bool(seen.batches) != gone
            assert bool(await again.attempts_of(["a"])) != gone
            assert seen.live.num_spans == (0 if gone else 3)
            await again.close()
            if not reached:
                return
        raise AssertionError("forget has no end")

    run(test())


@pytest.mark.parametrize("after", [False, True])
def test_an_opening_cut_off_can_be_repeated(
    wire: WireServer, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dies while it finishes the write that died before."""

    async def test() -> None:
        for place in range(100):
            run_id = secrets.token_hex(4)
            journal = mortal(wire, run_id, monkeypatch)
            await journal.open()
            await journal.write(*group(1))
            wire.break_at(3, after=True)
            try:
                await journal.write(*group(2))
                acknowledged = True
            except StoreError:
                acknowledged = False
            await kill(journal, monkeypatch)
            wire.revive()
            journal = mortal(wire, run_id, monkeypatch)
            wire.break_at(place, after=after)
            with contextlib.suppress(StoreError):
                await journal.open()
            reached = wire.dead
            await kill(journal, monkeypatch)
            wire.revive()
            again, seen = await reopened(wire, run_id)
            assert seen.is_group(2) or (seen.is_group(1) and not acknowledged), (place, vars(seen))
            await again.close()
            if not reached:
                return
        raise AssertionError("open has no end")

    run(test())


def test_a_store_that_comes_late_changes_nothing() -> None:
    """Replaced between its commit and its last step, it puts old documents over new ones in vain."""

    async def test() -> None:
        with WireServer(replica_set=False) as wire:
            old = journal_of(wire, "run", seconds=10)
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
            new, seen = await reopened(wire, "run")
            assert seen.is_group(2), "its commit had happened"
            await new.write(*group(3))
            late.set()
            await writing
            with pytest.raises(StoreError, match="taken this run over"):
                await old.write(*group(4))
            await new.close()
            again, seen = await reopened(wire, "run")
            assert seen.is_group(3), vars(seen)
            await again.close()
            await old.close()

    run(test())


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=4), st.booleans())
def test_deaths_in_any_order(deaths: list[tuple[int, bool]], replica_set: bool) -> None:
    async def test() -> None:
        with WireServer(replica_set=replica_set) as wire, pytest.MonkeyPatch.context() as patch:
            number = 0
            for place, after in [(100, False), *deaths]:
                journal = mortal(wire, "run", patch)
                wire.break_at(place + 15, after=after)
                acknowledged = number
                with contextlib.suppress(StoreError):
                    await journal.open()
                    for following in range(number + 1, number + 4):
                        await journal.write(*group(following))
                        acknowledged = following
                await kill(journal, patch)
                wire.revive()
                again, seen = await reopened(wire, "run")
                number = max(seen.rollouts.values())
                assert acknowledged <= number <= acknowledged + 1
                assert seen.is_group(number), vars(seen)
                await again.close()

    run(test())


def test_parts_of_many_sizes_come_back_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group larger than a document, written and finished by the next store."""

    async def test() -> None:
        with WireServer(replica_set=False) as wire:
            journal = journal_of(wire, "run", seconds=30)
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
            again, _ = await reopened(wire, "run")
            assert await again.payloads([("a", "at")]) == spans
            await again.close()

    run(test())
