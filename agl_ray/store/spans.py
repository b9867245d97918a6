"""The core's half that keeps spans: batches numbered and journalled in one commit, payloads kept beside the machine and never opened.

What it is: `add_spans` and `read_spans`. Spans that came as objects are known by their ids: a batch of them names the ids of its spans
(`batch_id` = the ids joined by commas), and a batch with a known one is answered `KnownSpans`, so that the client leaves that out.
Who calls it: `agl_ray.store.core.StoreCore` builds on it. Test alone: tests/unit/test_store_core.py, tests/store_catalogue/spans.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from agl_ray.store.base import rollouts
from agl_ray.store.checks import check_text
from agl_ray.store.journals.base import AttemptKey, BatchEntry, SpanRow
from agl_ray.store.lists import Lists
from agl_ray.store.numbers import BETWEEN_IDS
from agl_ray.store.payload import Payloads, join
from agl_ray.types import AglError, InputError
from agl_ray.types.errors import KnownSpans


class SpanItem(NamedTuple):
    """A batch of spans on its way. first: the number of its first span where the caller chose it (the others follow).
    by_id: `batch_id` lists the ids of its spans, each to be stored once. again: this repeats a call whose answer was lost."""

    rollout_id: str
    attempt_id: str
    batch_id: str
    number: int
    payload: bytes
    first: int | None = None
    by_id: bool = False
    again: bool = False

    @property
    def key(self) -> AttemptKey:
        return (self.rollout_id, self.attempt_id)

    @property
    def span_ids(self) -> list[str]:
        return self.batch_id.split(BETWEEN_IDS)


class Spans(Lists):
    """Writing and reading of span payloads."""

    async def add_spans(self, items: Sequence[SpanItem]) -> list[BatchEntry | AglError]:
        """Number and journal many batches in one commit; per batch where it was put, or what was wrong with it."""
        self._check()
        items = [SpanItem(*item) for item in items]  # plain tuples will do
        async with self._present(rollouts({item.rollout_id for item in items})):
            results: list[BatchEntry | AglError] = []
            rows: list[SpanRow] = []
            late: list[int] = []
            for place, item in enumerate(items):
                try:
                    if self.machine.state.attempt(*item.key).status.final:
                        late.append(place)
                        results.append(BatchEntry(0, 0))
                    else:
                        results.append(self._known(item) or self._number(item, rows))
                except AglError as error:
                    results.append(error)
            await self._committed(None, rows)
            for place in late:
                try:
                    results[place] = await self._add_late(items[place])
                except (InputError, KnownSpans) as error:
                    results[place] = error
            return results

    def _known(self, item: SpanItem) -> BatchEntry | None:
        """Where the batch of an open attempt was put before. KnownSpans where some of its spans were, one by one."""
        entry = self.machine.known_batch(item.key, item.batch_id)
        if not item.by_id or (item.again and entry is not None):
            return entry
        known = self.machine.known_spans(item.key, item.span_ids)
        if known:
            raise KnownSpans(BETWEEN_IDS.join(known))
        return None

    def _number(self, item: SpanItem, rows: list[SpanRow]) -> BatchEntry:
        if item.number < 1:
            raise InputError(
                f"add_spans: expected one span or more in the batch, got {item.number}"
            )
        check_text("batch_id", item.batch_id)
        num_before = self.machine.state.attempt(*item.key).num_spans
        entry = self._run(
            self.machine.add_spans,
            item.key,
            item.batch_id,
            item.number,
            len(item.payload),
            first=item.first,
            by_id=item.by_id,
        )
        row = SpanRow(item.batch_id, item.key, entry.first, item.number, item.payload)
        rows.append(row)
        self._cache.append(row, num_before)
        self._ends.arrived(item.key, item.number)
        return entry

    async def _add_last(self, item: SpanItem) -> None:
        """Number spans and have them journalled by the next commit, which is that of their attempt's end."""
        item = SpanItem(*item)
        async with self._present(rollouts([item.rollout_id])):
            if self.machine.state.attempt(*item.key).status.final:
                await self._add_late(item)
                return
            rows: list[SpanRow] = []
            if self._known(item) is None:
                self._number(item, rows)
            self._submit(rows)

    async def _add_late(self, item: SpanItem) -> BatchEntry:
        """Spans of an attempt that has ended (and is in memory): kept, and a repetition is looked up in the journal, one at
        a time."""
        async with self._late:
            await self._committed(None)
            entry = await self._journal.find_batch(item.key, item.batch_id)
            if item.by_id and (entry is None or not item.again):
                entry = None
                await self._refuse_known(item)
            self._check()
            if entry is not None:
                return entry
            rows: list[SpanRow] = []
            entry = self._number(item, rows)
            return await self._committed(entry, rows)

    async def _refuse_known(self, item: SpanItem) -> None:
        """KnownSpans where the journal has some of the spans of a late batch."""
        rows = await self._journal.payloads([item.key])
        stored = {one for row in rows for one in row.batch_id.split(BETWEEN_IDS)}
        known = [one for one in item.span_ids if one in stored]
        if known:
            raise KnownSpans(BETWEEN_IDS.join(known))

    async def next_sequence_ids(self, keys: Sequence[AttemptKey]) -> list[int]:
        """Numbers for spans to come, of each attempt's rollout, never given to another span."""
        needs = rollouts({key[0] for key in keys})
        return await self._do(self.machine.next_sequence_ids, keys, needs=needs)

    async def read_spans(self, keys: Sequence[AttemptKey]) -> Payloads:
        """The payloads of these attempts, in the given order; from memory where they are all there."""
        self._check()
        async with self._present(rollouts({key[0] for key in keys})):
            wanted = {key: self.machine.state.attempt(*key) for key in keys}
        found = {key: self._cache.get(key) for key in wanted}
        missing = {
            key: one.num_spans
            for key, one in wanted.items()
            if found[key] is None and one.num_spans
        }
        await self._committed(None)
        if missing:
            found |= await self._read_back(missing)
        ordered = {key: sorted(rows or (), key=_first) for key, rows in found.items()}
        return join([row for key in keys for row in ordered[key]])

    async def _read_back(self, expected: dict[AttemptKey, int]) -> dict[AttemptKey, list[SpanRow]]:
        """From the journal into the cache. expected: how many spans each had when it was asked for."""
        found: dict[AttemptKey, list[SpanRow]] = {key: [] for key in expected}
        for row in await self._journal.payloads(list(expected)):
            found[row.key].append(row)
        for key, rows in found.items():
            known = self.machine.state.attempts.get(key[0], {}).get(key[1])
            number = expected[key] if known is None else known.num_spans
            if sum(row.number for row in rows) == number:
                self._cache.fill(key, rows)
        return found


def _first(row: SpanRow) -> int:
    return row.first
