"""The store's change events: an ordered stream that anybody may follow from a cursor, without ever slowing the store.

What it is: every changed record makes an event, written in the same transaction as the record; a reader gets it once that is
journalled, from memory where it is recent, else from the journal. Readers pull (a long poll): a slow one falls behind, nothing waits for
it. The newest `keep` events are kept.
Who calls it: `agl_ray.store.base`. Test alone: tests/unit/test_store_events.py.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from agl_ray.store.journals.base import EventRow, Journal
from agl_ray.types import (
    Attempt,
    EventPage,
    ResourcesUpdate,
    Rollout,
    StoreError,
    StoreEvent,
    Worker,
)

KEEP = 100_000
RECENT = 4096  # in memory
MOST = 1000  # events of one page
_decoder = msgspec.json.Decoder(StoreEvent)


class EventLog:
    """on_failure: told where the journal cannot forget. keep: how many events the journal holds at least; up to a tenth more are
    forgotten together."""

    def __init__(
        self, journal: Journal, on_failure: Callable[[StoreError], None], keep: int = KEEP
    ) -> None:
        self._journal, self._on_failure, self._keep = journal, on_failure, keep
        self._last = self._told = 0  # given out; journalled
        self._oldest = 1
        self._recent: deque[StoreEvent] = deque(maxlen=RECENT)
        self._travelling: list[tuple[asyncio.Future[None], list[StoreEvent]]] = []
        self._readers: set[asyncio.Future[None]] = set()
        self._dropping: asyncio.Task[None] | None = None

    async def restore(self, last: int) -> None:
        """Go on behind event `last`, the journal's newest."""
        self._last = self._told = last
        first = await self._journal.events(0, 1)
        self._oldest = first[0].number if first else last + 1

    def note(
        self, changes: Mapping[tuple[str, str], Any], now: float
    ) -> tuple[list[StoreEvent], list[EventRow]]:
        """The events of these changed records, (kind, key) -> record, and their rows for the journal."""
        events = []
        for (kind, key), record in changes.items():
            self._last += 1
            events.append(_event(self._last, now, kind, key, record))
        return events, [EventRow(one.number, msgspec.json.encode(one)) for one in events]

    def sent(self, commit: asyncio.Future[None], events: list[StoreEvent]) -> None:
        """`events` travel to the journal with `commit`."""
        if events:
            self._travelling.append((commit, events))

    def arrived(self, commit: asyncio.Future[None]) -> None:
        """`commit` is in the journal: its events may be told."""
        while self._travelling and self._travelling[0][0] is commit:
            _, events = self._travelling.pop(0)
            self._recent.extend(events)
            self._told = events[-1].number
        for reader in self._readers:
            if not reader.done():
                reader.set_result(None)
        if self._told - self._oldest > self._keep * 1.1 and self._dropping is None:
            up_to = self._told - self._keep
            self._dropping = asyncio.ensure_future(self._drop(up_to))

    async def _drop(self, up_to: int) -> None:
        try:
            await self._journal.drop_events(up_to)
            self._oldest = up_to + 1
        except StoreError as error:
            self._on_failure(error)
        finally:
            self._dropping = None

    async def read(self, after: int, limit: int, wait_seconds: float) -> EventPage:
        """Up to `limit` events with a number above `after`; waits up to `wait_seconds` for the first of them."""
        limit = max(0, min(limit, MOST))
        if after >= self._told and limit > 0 and wait_seconds > 0:
            await self._wait(wait_seconds)
        if after >= self._told or limit == 0:
            return EventPage(events=(), next=after, oldest=self._oldest)
        events = await self._between(after, limit)
        following = events[-1].number if events else after
        return EventPage(events=tuple(events), next=following, oldest=self._oldest)

    async def _between(self, after: int, limit: int) -> list[StoreEvent]:
        if self._recent and self._recent[0].number <= after + 1:
            start = after + 1 - self._recent[0].number
            return [self._recent[i] for i in range(start, min(start + limit, len(self._recent)))]
        return [_decoder.decode(row.body) for row in await self._journal.events(after, limit)]

    async def _wait(self, seconds: float) -> None:
        reader: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._readers.add(reader)
        try:
            await asyncio.wait([reader], timeout=seconds)
            if reader.done():
                reader.result()  # raises where the store has failed
        finally:
            self._readers.discard(reader)

    def fail(self, error: Exception) -> None:
        for reader in self._readers:
            if not reader.done():
                reader.set_exception(error)

    async def close(self) -> None:
        """Wait for what is being forgotten."""
        if self._dropping is not None:
            await asyncio.wait([self._dropping])


def _event(number: int, now: float, kind: str, key: str, record: Any) -> StoreEvent:
    if isinstance(record, Rollout):
        return StoreEvent(
            number=number, time=now, kind=kind, key=key, status=record.status, mode=record.mode
        )
    if isinstance(record, Attempt):
        return StoreEvent(
            number=number,
            time=now,
            kind=kind,
            key=key,
            status=record.status,
            end_reason=record.end_reason,
            reward=record.reward,
        )
    if isinstance(record, ResourcesUpdate):
        return StoreEvent(number=number, time=now, kind=kind, key=key, version=record.version)
    status = record.status if isinstance(record, Worker) else None
    return StoreEvent(number=number, time=now, kind=kind, key=key, status=status)
