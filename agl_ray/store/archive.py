"""A store opened for reading alone, whether its run lives or not: what listing, showing and exporting stand on.

What it is: `open_archive(url, settings)` gives an `Archive`. A SQLite file or a run in PostgreSQL (payloads outside, encrypted) is read
beside its owner, as it was at one moment. A MongoDB is opened as its store, so a run that lives there is refused. A running store's
HTTP door is asked as any client asks it (`archive_http`). Answers come in pieces of bounded size.
Who calls it: `agl_ray.store.export`, `agl_ray.cli.store`. Test alone: tests/unit/test_store_archive.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from agl_ray.store.journals.base import (
    AttemptKey,
    Condition,
    Journal,
    Live,
    Query,
    SpanRow,
    SpanTotals,
)
from agl_ray.store.journals.marks import open_checked
from agl_ray.store.journals.opening import open_reading
from agl_ray.store.journals.settings import JournalSettings
from agl_ray.store.payload import join, table_of
from agl_ray.store.rows import record_of
from agl_ray.store.tables import BATCH_ID
from agl_ray.types import Attempt, InputError, ResourcesUpdate, Rollout, Worker, replace

PAGE = 500  # records per question
SPAN_BYTES = 16 * 2**20  # payloads read at once (one attempt at least)


class Placed(NamedTuple):
    """A rollout, its ordinal of creation (None: not known), and its place in the queue (0: it does not wait, or not known)."""

    rollout: Rollout
    created: int | None
    position: int


class Archive(ABC):
    """One store's records. `live` has its counts; `alive`: whether its run was alive when it was opened."""

    live: Live
    alive: bool

    @abstractmethod
    def rollouts(
        self,
        *,
        status_in: Sequence[str] | None = None,
        mode: str | None = None,
        newest_first: bool = False,
        most: int | None = None,
    ) -> AsyncIterator[list[Placed]]:
        """Pages of rollouts in order of creation; at most `most` rollouts."""

    @abstractmethod
    async def rollout(self, rollout_id: str) -> Rollout | None: ...

    @abstractmethod
    async def ids_like(self, start: str) -> list[str]:
        """Ids of rollouts that start so."""

    @abstractmethod
    async def attempts(self, rollout_ids: Sequence[str]) -> list[Attempt]:
        """All attempts of these rollouts, by rollout and sequence; `num_spans` is what the store holds."""

    @abstractmethod
    async def span_totals(self, rollout_ids: Sequence[str]) -> list[SpanTotals]:
        """Of their attempts that have spans, in the given order of rollouts."""

    @abstractmethod
    def spans(self, totals: Sequence[SpanTotals]) -> AsyncIterator[pa.Table]:
        """The spans of these attempts in the columns of `agl_ray.store.tables.SPANS`, in pieces of bounded size."""

    @abstractmethod
    def resources(self) -> AsyncIterator[list[tuple[ResourcesUpdate, int | None]]]:
        """Pages of (snapshot, number of its update where that is known), the latest last."""

    @abstractmethod
    async def workers(self) -> list[Worker]: ...

    @abstractmethod
    def values(self) -> AsyncIterator[list[tuple[str, bytes]]]:
        """Pages of named state."""


class JournalArchive(Archive):
    """The records of an opened journal."""

    def __init__(self, journal: Journal, live: Live, alive: bool = False) -> None:
        self._journal = journal
        self.live, self.alive = live, alive

    async def rollouts(
        self,
        *,
        status_in: Sequence[str] | None = None,
        mode: str | None = None,
        newest_first: bool = False,
        most: int | None = None,
    ) -> AsyncIterator[list[Placed]]:
        must = [] if status_in is None else [Condition("status", tuple(status_in))]
        must += [] if mode is None else [Condition("mode", (mode,))]
        query = Query("rollout", must=tuple(must), order_by="created", descending=newest_first)
        left = most
        async for rows in self._pages(query, left):
            yield [Placed(record_of(row, Rollout), row.columns[0], row.position) for row in rows]

    async def _pages(self, query: Query, most: int | None = None) -> AsyncIterator[list[Any]]:
        after, left = None, most
        while left is None or left > 0:
            size = PAGE if left is None else min(PAGE, left)
            page = (await self._journal.query(query._replace(after=after, limit=size))).rows
            if page:
                yield page
            if len(page) < size:
                return
            last = page[-1]
            by = {"created": lambda row: row.columns[0], "position": lambda row: row.position}
            after = (by[query.order_by](last), last.key)
            left = None if left is None else left - len(page)

    async def rollout(self, rollout_id: str) -> Rollout | None:
        rows = await self._journal.rows("rollout", [rollout_id])
        return record_of(rows[0], Rollout) if rows else None

    async def ids_like(self, start: str) -> list[str]:
        return await self._journal.keys("rollout", start)

    async def attempts(self, rollout_ids: Sequence[str]) -> list[Attempt]:
        held = {one.key: one.number for one in await self.span_totals(rollout_ids)}
        records = [record_of(row, Attempt) for row in await self._journal.attempts_of(rollout_ids)]
        return [
            replace(one, num_spans=held.get((one.rollout_id, one.attempt_id), 0)) for one in records
        ]

    async def span_totals(self, rollout_ids: Sequence[str]) -> list[SpanTotals]:
        place = {rollout_id: i for i, rollout_id in enumerate(rollout_ids)}
        totals = await self._journal.span_totals(rollout_ids)
        return sorted(totals, key=lambda one: (place[one.key[0]], one.last))

    async def spans(self, totals: Sequence[SpanTotals]) -> AsyncIterator[pa.Table]:
        keys: list[AttemptKey] = []
        size = 0
        for one in totals:
            if keys and size + one.size > SPAN_BYTES:
                yield span_table(await self._journal.payloads(keys))
                keys, size = [], 0
            keys.append(one.key)
            size += one.size
        if keys:
            yield span_table(await self._journal.payloads(keys))

    async def resources(self) -> AsyncIterator[list[tuple[ResourcesUpdate, int | None]]]:
        async for rows in self._pages(Query("resources", order_by="position")):
            yield [(record_of(row, ResourcesUpdate), row.position) for row in rows]

    async def workers(self) -> list[Worker]:
        return [record_of(row, Worker) for row in self.live.workers]

    async def values(self) -> AsyncIterator[list[tuple[str, bytes]]]:
        keys = await self._journal.keys("state", "")
        for start in range(0, len(keys), PAGE):
            rows = await self._journal.rows("state", keys[start : start + PAGE])
            yield sorted((row.key, row.body) for row in rows)


def span_table(rows: Sequence[SpanRow]) -> pa.Table:
    """Payloads as a table in `SPANS`, sequence ids filled in. In one piece: a piece per payload would weigh more than small spans do."""
    table = table_of([join(rows)]).combine_chunks()
    ids = np.repeat(
        np.array([row.batch_id for row in rows], dtype=object), [r.number for r in rows]
    )
    return table.append_column(BATCH_ID, pa.array(ids, pa.string()))


@asynccontextmanager
async def open_archive(
    url: str, settings: JournalSettings | None = None, *, api_key: str | None = None
) -> AsyncIterator[Archive]:
    """The store at `url` for reading; `http://host:port` is the door of a running one, which may ask for `api_key`. InputError for `memory://` and for
    addresses that are none; StoreError says what is wrong with the journal; WaitTimeout: no store answers at that door."""
    if url.startswith(("http://", "https://")):
        from agl_ray.store.archive_http import open_door

        async with open_door(url, api_key) as door:
            yield door
        return
    if url == "memory://":
        raise InputError(
            "store memory://: it lives in its own process alone; there is nothing to read"
        )
    journal, inner = open_reading(url, settings)
    live = await open_checked(journal, must_exist=True)
    try:
        yield JournalArchive(journal, live, inner is not None and inner.alive)
    finally:
        await journal.close()
