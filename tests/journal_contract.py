"""What every journal must do, as one suite: a test class per journal inherits `JournalContract` and has a fixture `storage`.

Every method of the protocol is compared with the model of tests/journal_model.py over generated histories; the rest is what a model
does not show: large writes, long lists walked page by page, reads beside a writer, a reader that goes away.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from journal_model import (
    ALL_IDS,
    PLAIN_IDS,
    QUERIES,
    DropEvents,
    Forget,
    Model,
    Write,
    operations,
    value_of,
)

from agl_ray.store.journals.base import (
    COLUMNS,
    BatchEntry,
    Condition,
    EventRow,
    Journal,
    Live,
    Query,
    Row,
    SpanRow,
)
from agl_ray.types import StoreError

KINDS = [kind for kind in COLUMNS if kind != "meta"]


class Storage:
    """Where journals of one kind are kept. `fresh()`: a function that gives a new journal object on the same, at first empty, data.

    examples: of hypothesis, by what opening costs. exact_sizes: payloads rest with the size they came with. any_id: ids with
    character 0, and with the last one, are told apart. keeps_last_event: its number outlives the events themselves."""

    def __init__(
        self,
        fresh: Callable[[], Callable[[], Journal]],
        *,
        examples: int = 100,
        exact_sizes: bool = True,
        any_id: bool = True,
        keeps_last_event: bool = True,
    ) -> None:
        self.fresh, self.examples, self.exact_sizes = fresh, examples, exact_sizes
        self.ids = ALL_IDS if any_id else PLAIN_IDS
        self.keeps_last_event = keeps_last_event


def rollout(name: str, position: int = 0, **columns: Any) -> Row:
    values = {"created": 1, "status": "queuing", "start_time": 1.0, **columns}
    return Row(
        "rollout", name, position, tuple(values.get(name) for name in COLUMNS["rollout"]), b"{}"
    )


class JournalContract:
    """`storage`: a fixture of each subclass's module."""

    def test_histories(self, storage: Storage) -> None:
        @settings(
            max_examples=storage.examples,
            report_multiple_bugs=False,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        )
        @given(operations(storage.ids), st.lists(QUERIES, min_size=1, max_size=6))
        def run(history: list[Any], queries: list[Query]) -> None:
            asyncio.run(follow(storage, history, queries))

        run()

    def test_a_large_write_is_there_as_a_whole(self, storage: Storage) -> None:
        rows = [rollout(f"ro-{i:05}", i + 1, created=i) for i in range(5000)]
        spans = [
            SpanRow(f"b{i}", ("ro-00000", "at"), i + 1, 1, os.urandom(1000)) for i in range(500)
        ]
        spans += [
            SpanRow(f"big{i}", ("ro-00001", "at"), i + 1, 1, os.urandom(3 * 2**20 + i))
            for i in range(3)
        ]

        async def main(journal: Journal) -> None:
            await journal.write(rows, spans)
            found = await journal.query(Query("rollout", order_by="created", count=True))
            assert found == (rows, 5000)
            assert await journal.rows("rollout", []) == []
            assert len(await journal.rows("rollout", [row.key for row in rows])) == 5000
            assert await journal.payloads([("ro-00001", "at"), ("ro-00000", "at")]) == [
                *spans[500:],
                *spans[:500],
            ]
            await journal.forget([row.key for row in rows])
            assert (await journal.query(Query("rollout", count=True))).total == 0
            assert await journal.payloads([("ro-00001", "at")]) == []

        self.use(storage, main)

    @pytest.mark.parametrize("descending", [False, True])
    @pytest.mark.parametrize("order_by", ["key", "created", "start_time", "end_time", "mode"])
    def test_a_long_list_page_by_page(
        self, storage: Storage, order_by: str, descending: bool
    ) -> None:
        """Each page begins behind the last row of the one before; ties and empty values included."""
        ends: list[float | None] = [None, 1.0, 2.0, None, 3.0]
        rows = [
            rollout(
                f"ro-{i * 37 % 100:03}",
                created=i,
                start_time=float(i // 10),
                end_time=ends[i % 5],
                mode="train" if i % 3 else None,
            )
            for i in range(100)
        ]

        async def main(journal: Journal) -> None:
            await journal.write(rows, [])
            question = Query("rollout", order_by=order_by, descending=descending, limit=7)
            walked: list[Row] = []
            while page := (await journal.query(question)).rows:
                walked += page
                question = question._replace(after=(value_of(page[-1], order_by), page[-1].key))
            model = Model()
            model.write(rows, [], [])
            assert walked == model.query(question._replace(limit=-1, after=None)).rows

        self.use(storage, main)

    def test_reads_beside_a_writer_see_whole_writes(self, storage: Storage) -> None:
        """Every write sets both rollouts to the same number."""

        async def main(journal: Journal) -> None:
            await journal.write([rollout("a", created=0), rollout("b", created=0)], [])

            async def write() -> None:
                for number in range(1, 30):
                    rows = [rollout(name, created=number) for name in "ab"]
                    await journal.write(rows, [], [EventRow(number, b"e")])

            async def read() -> None:
                for _ in range(30):
                    found = await journal.rows("rollout", ["a", "b"])
                    assert len({row.columns[0] for row in found}) == 1
                    assert len(found) == 2

            await asyncio.gather(write(), *(read() for _ in range(4)))
            assert [row.number for row in await journal.events(0, 100)] == list(range(1, 30))

        self.use(storage, main)

    def test_a_reader_that_goes_away_harms_nobody(self, storage: Storage) -> None:
        async def main(journal: Journal) -> None:
            payload = os.urandom(2**20)
            spans = [SpanRow(f"b{i}", ("ro", "at"), i + 1, 1, payload) for i in range(8)]
            await journal.write([rollout("ro")], spans)
            for pause in (0.0, 0.001, 0.003, 0.01, 0.02):
                reading = asyncio.ensure_future(journal.payloads([("ro", "at")]))
                await asyncio.sleep(pause)
                reading.cancel()
                await asyncio.wait([reading])
            assert len(await journal.payloads([("ro", "at")])) == 8
            assert len(await journal.rows("rollout", ["ro"])) == 1

        self.use(storage, main)

    def test_a_closed_durable_journal_says_so(self, storage: Storage) -> None:
        async def main() -> None:
            journal = storage.fresh()()
            await journal.open()
            await journal.close()
            if not journal.durable:
                return
            with pytest.raises(StoreError, match=r"closed|not open"):
                await journal.write([rollout("a")], [])
            with pytest.raises(StoreError, match=r"closed|not open"):
                await journal.rows("rollout", ["a"])
            await journal.close()  # twice is as good as once

        asyncio.run(main())

    def test_data_that_must_be_there(self, storage: Storage) -> None:
        async def main() -> None:
            make = storage.fresh()
            journal = make()
            if not journal.durable:
                return
            with pytest.raises(StoreError, match="gone"):
                await journal.open(must_exist=True)
            await journal.close()
            first = make()
            await first.open()
            await first.close()
            again = make()
            assert (await again.open(must_exist=True)).starts == 2
            await again.close()

        asyncio.run(main())

    def use(self, storage: Storage, work: Callable[[Journal], Any]) -> None:
        async def main() -> None:
            journal = storage.fresh()()
            try:
                await journal.open()
                await work(journal)
            finally:
                await journal.close()

        asyncio.run(main())


async def follow(storage: Storage, history: list[Any], queries: list[Query]) -> None:
    """Do the same to a fresh journal and to a model, and compare everything that can be asked."""
    make, model = storage.fresh(), Model()
    journal = make()
    live = await journal.open()
    check_live(live, model, storage)
    try:
        counter = 0
        for number, step in enumerate(history):
            if isinstance(step, Write):
                written = placed(step, model, counter)
                counter += len(step.rows)
                model.write(*written)
                await journal.write(*written)
            elif isinstance(step, Forget):
                model.forget(step.ids)
                await journal.forget(step.ids)
            elif isinstance(step, DropEvents):
                up_to = int(step.share * model.last_event)
                model.drop_events(up_to)
                await journal.drop_events(up_to)
            else:
                await journal.close()
                journal = make()
                model.starts += 1
                check_live(await journal.open(must_exist=number > 0), model, storage)
        await compare(journal, model, queries, storage)
    finally:
        await journal.close()


def placed(
    step: Write, model: Model, counter: int
) -> tuple[list[Row], list[SpanRow], list[EventRow]]:
    """Positions only grow, that of an attempt stays, batches follow one another, as a store does it."""
    places = {row.key: row.position for row in model.of("attempt")}
    rows = []
    for i, row in enumerate(step.rows):
        place = row.position and counter + i + 1
        if row.kind == "attempt":
            place = places.setdefault(row.key, place)
        rows.append(row._replace(position=place))
    last = {span.key[0]: span.first + span.number - 1 for span in model.spans}
    spans = []
    for i, (rollout_id, attempt_id, number, payload) in enumerate(step.spans):
        first = last.get(rollout_id, 0) + 1
        last[rollout_id] = first + number - 1
        batch = f"b{len(model.spans) + i}"
        while any(one.batch_id == batch for one in model.spans):
            batch += "x"
        spans.append(SpanRow(batch, (rollout_id, attempt_id), first, number, payload))
    events = [EventRow(model.last_event + 1 + i, body) for i, body in enumerate(step.events)]
    return rows, spans, events


def check_live(live: Live, model: Model, storage: Storage) -> None:
    rollouts, resources = model.of("rollout"), model.of("resources")
    attempts = [row for row in model.of("attempt") if row.columns[3] is None]
    assert live.starts == model.starts
    places = [(row.key, row.position) for row in rollouts if row.position > 0]
    assert live.waiting == sorted(places, key=lambda place: place[1])
    assert live.open_attempts == sorted(attempts, key=lambda row: row.key)
    assert set(live.open_batches) == model.open_batches()
    assert len(live.open_batches) == len(model.open_batches())
    assert by_key(live.workers) == by_key(model.of("worker"))
    latest = max((row.position for row in resources), default=None)
    assert (live.latest_resources and live.latest_resources.position) == latest
    if latest:
        assert live.latest_resources in resources
    assert live.rollouts_by_status == model.counted("rollout", "status")
    if live.rollouts_by_mode is not None:
        of = [*COLUMNS["rollout"]]
        pairs = [[row.columns[of.index(name)] for name in ("status", "mode")] for row in rollouts]
        assert live.rollouts_by_mode == Counter((status, mode) for status, mode in pairs)
    assert live.attempts_by_reason == model.counted("attempt", "end_reason")
    assert live.num_resources == len(resources)
    assert live.num_spans == sum(span.number for span in model.spans)
    if storage.exact_sizes:
        assert live.span_bytes == sum(len(span.payload) for span in model.spans)
    assert live.last_created == max((row.columns[0] for row in rollouts), default=0)
    assert live.last_position == max((row.position for row in [*rollouts, *resources]), default=0)
    if storage.keeps_last_event:
        assert live.last_event == model.last_event


def by_key(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row.key)


async def compare(journal: Journal, model: Model, queries: list[Query], storage: Storage) -> None:
    for kind in KINDS:
        keys = [row.key for row in model.of(kind)]
        found = await journal.rows(kind, [*keys, "nobody", *keys[:1]])
        assert by_key(found) == by_key(model.of(kind))
        for prefix in ("", "a", "a\0", "\x01", "\u00e9", "\U0010ffff", "\ud7ff"):
            matching = sorted(key for key in keys if key.startswith(prefix))
            assert await journal.keys(kind, prefix) == matching, (kind, prefix)
    ids = sorted({span.key[0] for span in model.spans} | {row.key for row in model.of("rollout")})
    attempts = await journal.attempts_of([*ids, "nobody"])
    order = [(row.columns[0], row.position) for row in attempts]
    assert order == sorted(order)
    in_ids = [row for row in model.of("attempt") if row.columns[0] in ids]
    assert by_key(attempts) == by_key(in_ids)
    await compare_spans(journal, model, ids, storage)
    for number in (0, model.last_event - 1, model.last_event):
        rows = [row for key, row in sorted(model.event_rows.items()) if key > number]
        assert await journal.events(number, 1000) == rows
        assert await journal.events(number, 1) == rows[:1]
    for query in queries:
        assert await journal.query(query) == model.query(query), query
        every = query._replace(must=(), where=(), after=None, limit=-1, offset=0)
        assert await journal.query(every) == model.query(every), every


async def compare_spans(journal: Journal, model: Model, ids: list[str], storage: Storage) -> None:
    totals = await journal.span_totals([*ids, "nobody"])
    if storage.exact_sizes:
        assert set(totals) == model.totals(ids)
    assert len(totals) == len(model.totals(ids))
    assert {one[:3] for one in totals} == {one[:3] for one in model.totals(ids)}
    keys = list(dict.fromkeys(span.key for span in model.spans))
    expected = [span for key in keys for span in model.payloads(key)]
    assert await journal.payloads([*keys, ("nobody", "at")]) == expected
    for span in model.spans:
        found = await journal.find_batch(span.key, span.batch_id)
        assert found == BatchEntry(span.first, span.number)
        assert await journal.find_batch((span.key[0], "nobody"), span.batch_id) is None
    assert await journal.find_batch(("nobody", "at"), "b") is None
    await journal.query(Query("rollout", where=(Condition("key", is_in=()),)))
