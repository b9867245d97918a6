"""A journal in the fewest words, as the measure of every real one: lists, filters, sorts.

`Model` does what `agl_ray.store.journals.base.Journal` says; `operations` (hypothesis) makes what stores write, with awkward texts; `QUERIES`
makes questions. Used by tests/journal_contract.py.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from hypothesis import strategies as st

from agl_ray.store.journals.base import (
    COLUMNS,
    BatchEntry,
    Condition,
    EventRow,
    Page,
    Query,
    Row,
    SpanRow,
    SpanTotals,
)

FIELDS = {kind: {"key": str, "position": int, **columns} for kind, columns in COLUMNS.items()}


def value_of(row: Row, field: str) -> Any:
    if field in ("key", "position"):
        return getattr(row, field)
    return dict(zip(COLUMNS[row.kind], row.columns, strict=True))[field]


class Model:
    def __init__(self) -> None:
        self.records: dict[tuple[str, str], Row] = {}
        self.spans: list[SpanRow] = []
        self.event_rows: dict[int, EventRow] = {}
        self.starts = 1
        self.last_event = 0

    def write(self, rows: list[Row], spans: list[SpanRow], events: list[EventRow]) -> None:
        self.records.update({(row.kind, row.key): row for row in rows})
        self.spans += spans
        self.event_rows.update({event.number: event for event in events})
        self.last_event = max([self.last_event, *self.event_rows])

    def forget(self, ids: list[str]) -> None:
        def gone(row: Row) -> bool:
            return (row.kind == "rollout" and row.key in ids) or (
                row.kind == "attempt" and row.columns[0] in ids
            )

        self.records = {key: row for key, row in self.records.items() if not gone(row)}
        self.spans = [span for span in self.spans if span.key[0] not in ids]

    def drop_events(self, up_to: int) -> None:
        self.event_rows = {number: row for number, row in self.event_rows.items() if number > up_to}

    def of(self, kind: str) -> list[Row]:
        return [row for row in self.records.values() if row.kind == kind]

    def totals(self, ids: list[str]) -> set[SpanTotals]:
        found = set()
        for key in {span.key for span in self.spans if span.key[0] in ids}:
            of_attempt = [span for span in self.spans if span.key == key]
            numbers = [span.number for span in of_attempt]
            last = max(span.first + span.number - 1 for span in of_attempt)
            size = sum(len(span.payload) for span in of_attempt)
            found.add(SpanTotals(key, sum(numbers), last, size))
        return found

    def payloads(self, key: tuple[str, str]) -> list[SpanRow]:
        return sorted((one for one in self.spans if one.key == key), key=lambda one: one.first)

    def open_batches(self) -> set[tuple[str, tuple[str, str], BatchEntry]]:
        is_open = {row.columns[:2] for row in self.of("attempt") if row.columns[3] is None}
        return {
            (span.batch_id, span.key, BatchEntry(span.first, span.number))
            for span in self.spans
            if span.key in is_open
        }

    def counted(self, kind: str, field: str) -> dict[str, int]:
        return dict(Counter(value_of(row, field) or "" for row in self.of(kind)))

    def query(self, query: Query) -> Page:
        def holds(row: Row, one: Condition) -> bool:
            value = value_of(row, one.field)
            if one.is_in is not None:
                return value in one.is_in
            return value is not None and str(one.contains) in value

        def place(value: Any, key: str) -> tuple[Any, ...]:
            return (0, 0, key) if value is None else (1, value, key)

        rows = [row for row in self.of(query.kind) if all(holds(row, one) for one in query.must)]
        if query.where:
            join = any if query.any_of else all
            rows = [row for row in rows if join([holds(row, one) for one in query.where])]
        total = len(rows) if query.count else None
        at = {row.key: place(value_of(row, query.order_by), row.key) for row in rows}
        rows.sort(key=lambda row: at[row.key], reverse=query.descending)
        if query.after is not None:
            last = place(*query.after)
            rows = [
                row
                for row in rows
                if (at[row.key] < last if query.descending else at[row.key] > last)
            ]
        rows = rows[query.offset :]
        return Page(rows if query.limit < 0 else rows[: query.limit], total)


# What stores write. Ids come from few texts, so that records meet; among them all that databases trip over.

TEXTS = [
    "a",
    "b",
    "ab",
    "B",
    "",
    "a b",
    "a%b",
    "a_b",
    "\\",
    "'",
    '"',
    "\0",
    "a\0b",
    "\x01",
    "\x01\x03",
]
TEXTS += [
    "\x02\x05",
    "\u00e9",
    "e\u0301",
    "\ud7ff",
    "\ue000",
    "\uffff",
    "\U0001f600",
    "\U0010ffff",
    "NULL",
]
texts = st.sampled_from(TEXTS)
PLAIN_IDS = ["a", "b", "ab", "B", "\x01", "\u00e9", "\U0001f600", "\\'%"]
ALL_IDS = [*PLAIN_IDS, "a\0b", "\U0010ffff"]
numbers = st.sampled_from([0, 1, 2, 3, 2**53, 2**62])
floats = st.sampled_from([0.0, 0.5, 1.5, 1e300, 1.7e9, -1.0])
bodies = st.binary(max_size=20)
OF_TYPE: dict[type, st.SearchStrategy[Any]] = {str: texts, int: numbers, float: floats}


class Write(NamedTuple):
    """Positions are filled in when it is done: they only grow."""

    rows: list[Row]
    spans: list[tuple[str, str, int, bytes]]  # rollout, attempt, number of spans, payload
    events: list[bytes]


class Forget(NamedTuple):
    ids: list[str]


class DropEvents(NamedTuple):
    share: float


class Reopen(NamedTuple):
    """The store restarts."""


# Columns that have a value in every record of a store.
ALWAYS = {
    "key",
    "position",
    "created",
    "version",
    "status",
    "start_time",
    "rollout_id",
    "attempt_id",
}


def columns_of(kind: str) -> st.SearchStrategy[tuple[Any, ...]]:
    values = []
    for name, kept in COLUMNS[kind].items():
        values.append(OF_TYPE[kept] if name in ALWAYS else st.none() | OF_TYPE[kept])
        if name == "status":
            values[-1] = st.sampled_from(["queuing", "running", "failed"])
    return st.tuples(*values)


def operations(of_ids: list[str]) -> st.SearchStrategy[list[Any]]:
    """Histories of records with these ids."""
    ids = st.sampled_from(of_ids)

    def record(kind: str) -> st.SearchStrategy[Row]:
        if kind == "attempt":
            return st.builds(attempt, ids, ids, columns_of(kind), bodies)
        made = st.builds(Row, st.just(kind), ids, st.sampled_from([0, 1]), columns_of(kind), bodies)
        return made.map(fixed) if kind == "rollout" else made

    records = st.sampled_from([kind for kind in COLUMNS if kind != "meta"]).flatmap(record)
    writes = st.builds(
        Write,
        st.lists(records, max_size=8),
        st.lists(st.tuples(ids, ids, st.integers(1, 3), bodies), max_size=4),
        st.lists(bodies, max_size=2),
    )
    forget = st.builds(Forget, st.lists(ids, max_size=2))
    drop = st.builds(DropEvents, st.floats(0, 1))
    steps = st.one_of(writes, writes, writes, forget, drop, st.just(Reopen()))
    return st.lists(steps, min_size=1, max_size=8)


def fixed(row: Row) -> Row:
    """A rollout's ordinal and its start never change."""
    number = ALL_IDS.index(row.key)
    start_time = float(number % 3)
    return row._replace(columns=(number, *row.columns[1:3], start_time, *row.columns[4:]))


def attempt(rollout_id: str, attempt_id: str, columns: tuple[Any, ...], body: bytes) -> Row:
    names = (rollout_id, attempt_id)
    return Row("attempt", "/".join(names), 1, (*names, *columns[2:5], 1.0, *columns[6:]), body)


def condition(kind: str) -> st.SearchStrategy[Condition]:
    def of_field(field: str) -> st.SearchStrategy[Condition]:
        kept = FIELDS[kind][field]
        values = st.none() | OF_TYPE[kept]
        found = st.builds(lambda many: Condition(field, tuple(many)), st.lists(values, max_size=3))
        if kept is str:
            found |= st.builds(lambda part: Condition(field, contains=part), texts)
        return found

    return st.sampled_from(list(FIELDS[kind])).flatmap(of_field)


def queries_of(kind: str) -> st.SearchStrategy[Query]:
    def ordered(field: str) -> st.SearchStrategy[Query]:
        value = OF_TYPE[FIELDS[kind][field]]
        if field not in ALWAYS:
            value |= st.none()
        ids = st.sampled_from(ALL_IDS)
        after = st.none() | (
            ids.map(lambda key: (key, key)) if field == "key" else st.tuples(value, ids)
        )
        conditions = st.lists(condition(kind), max_size=2).map(tuple)
        return st.builds(
            Query,
            st.just(kind),
            conditions,
            conditions,
            st.booleans(),
            st.just(field),
            st.booleans(),
            after,
            st.sampled_from([-1, -1, 0, 1, 2, 5]),
            st.sampled_from([0, 0, 1, 2]),
            st.booleans(),
        )

    return st.sampled_from(list(FIELDS[kind])).flatmap(ordered)


QUERIES = st.sampled_from([kind for kind in COLUMNS if kind != "meta"]).flatmap(queries_of)
