"""The statements of the PostgreSQL journal: bulk writes, and a `Query` as SQL.

What it is: `Bulk` writes many rows by one statement (their values as arrays, their bytes end to end in one value, which PostgreSQL cuts:
measured 2.5 times as fast as executemany for records, and as fast for payloads); `page` and `count` translate a `Query`.
Who calls it: `agl_ray.store.journals.postgres`. Test alone: tests/integration/test_store_postgres.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from agl_ray.store.journals.base import Condition, Query, Row
from agl_ray.store.journals.postgres_schema import SPANS, TABLES, Exact
from agl_ray.types import InputError

CHUNK_BYTES = 4 * 2**20  # of bodies or payloads in one statement
CHUNK_ROWS = 2000
MOST_PARTS = 8  # of a page
LAST_CHARACTER = chr(0x10FFFF)


class Bulk:
    """`INSERT` of many rows into `table`, whose last column is of bytes. `update`: replace rows that are there; else leave them."""

    def __init__(self, table: sa.Table, *, update: bool) -> None:
        *plain, blob = [column for column in table.c if column.name != "run_id"]
        self._names = [column.name for column in plain]
        places = {"cut_from": sa.Integer(), "cut_size": sa.Integer()}
        given = {**{column.name: column.type for column in plain}, **places}
        rows = (
            sa.func.unnest(*(_array(name, kept) for name, kept in given.items()))
            .table_valued(*(sa.column(name, kept) for name, kept in given.items()))
            .render_derived()
        )
        cut = sa.func.substring(
            sa.bindparam("bytes", type_=sa.LargeBinary()), rows.c.cut_from, rows.c.cut_size
        )
        run_id = sa.cast(sa.bindparam("run", type_=Exact()), sa.Text)
        source = sa.select(run_id, *(rows.c[name] for name in self._names), cut)
        insert = pg.insert(table).from_select(["run_id", *self._names, blob.name], source)
        changed = {
            column.name: insert.excluded[column.name]
            for column in table.c
            if not column.primary_key
        }
        self.statement = (
            insert.on_conflict_do_update(constraint=table.primary_key, set_=changed)
            if update
            else insert.on_conflict_do_nothing()
        )

    def values(self, run_id: str, rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """Parameters for rows of (values of the columns after run_id ..., bytes)."""
        *columns, blobs = zip(*rows, strict=True)
        sizes = [len(blob) for blob in blobs]
        starts, place = [], 1
        for size in sizes:
            starts.append(place)
            place += size
        named = {
            f"p_{name}": list(values) for name, values in zip(self._names, columns, strict=True)
        }
        return {
            **named,
            "p_cut_from": starts,
            "p_cut_size": sizes,
            "bytes": b"".join(blobs),
            "run": run_id,
        }


def _array(name: str, kept: sa.types.TypeEngine[Any]) -> sa.Cast[Any]:
    plain = sa.Text() if isinstance(kept, Exact) else kept
    return sa.cast(sa.bindparam(f"p_{name}", type_=pg.ARRAY(kept)), pg.ARRAY(plain))


def chunks(rows: Sequence[Sequence[Any]]) -> Iterator[Sequence[Sequence[Any]]]:
    """Parts of `rows` that fit into one statement."""
    start = size = 0
    for place, row in enumerate(rows):
        if place > start and (size + len(row[-1]) > CHUNK_BYTES or place - start == CHUNK_ROWS):
            yield rows[start:place]
            start, size = place, 0
        size += len(row[-1])
    if start < len(rows):
        yield rows[start:]


def array_of(values: Sequence[Any], kept: sa.types.TypeEngine[Any]) -> sa.BindParameter[Any]:
    """One parameter, however many values they are."""
    return sa.bindparam(None, list(values), type_=pg.ARRAY(kept))


def any_of(column: sa.ColumnElement[Any], values: Sequence[Any]) -> sa.ColumnElement[bool]:
    """`column` is one of `values`."""
    return column == sa.any_(array_of(values, column.type))


def starts_with(column: sa.ColumnElement[str], prefix: str) -> list[sa.ColumnElement[bool]]:
    """A range, which the index knows; exact, since text sorts by code point."""
    if not prefix:
        return []
    found: list[sa.ColumnElement[bool]] = [column >= prefix]
    head = prefix.rstrip(LAST_CHARACTER)
    if head:
        after = ord(head[-1]) + 1
        after = 0xE000 if after == 0xD800 else after  # no character is between them
        found.append(column < head[:-1] + chr(after))
    return found


def records(kind: str) -> sa.Select[Any]:
    """All columns of a record, as `row_of` takes them."""
    return sa.select(*_columns(TABLES[kind]))


def row_of(kind: str, row: Sequence[Any]) -> Row:
    key, position, *columns, body = row
    return Row(kind, key, position, tuple(columns), bytes(body))


def page(query: Query, run_id: str) -> sa.Select[Any]:
    """The rows of `query`. A list costs what its rows cost, wherever it begins: each part of it starts inside an index."""
    table = TABLES[query.kind]
    where = _where(query, run_id)
    parts = [
        _ordered(sa.select(*_columns(table)).where(where, *part, *choice), table.c, query)
        for part in _behind(query)
        for choice in _choices(query)
    ]
    end = None if query.limit < 0 else query.limit + query.offset
    if len(parts) == 1:
        found: sa.Select[Any] = parts[0]
    else:
        limited = [sa.select(part.limit(end).subquery()) for part in parts]
        both = sa.union_all(*limited).subquery()
        found = _ordered(sa.select(*both.c), both.c, query)
    return found.limit(None if query.limit < 0 else query.limit).offset(query.offset or None)


def _choices(query: Query) -> list[list[sa.ColumnElement[bool]]]:
    """Rollouts of several statuses by creation: a part per status, since the index has them one after the other. Otherwise one
    part, of no further condition."""
    conditions = (*query.must, *(query.where if not query.any_of or len(query.where) == 1 else ()))
    if query.kind == "rollout" and query.order_by == "created" and query.limit >= 0:
        for one in conditions:
            values = list(dict.fromkeys(one.is_in or ()))
            if one.field == "status" and 1 < len(values) <= MOST_PARTS and None not in values:
                return [[_condition(TABLES["rollout"], one._replace(is_in=(v,)))] for v in values]
    return [[]]


def count(query: Query, run_id: str) -> sa.Select[Any]:
    """How many rows match, the place in the list aside."""
    table = TABLES[query.kind]
    return sa.select(sa.func.count()).select_from(table).where(_where(query, run_id))


def _columns(table: sa.Table) -> list[sa.Column[Any]]:
    return [column for column in table.c if column.name != "run_id"]


def _where(query: Query, run_id: str) -> sa.ColumnElement[bool]:
    table = TABLES[query.kind]
    found = [table.c.run_id == run_id, *(_condition(table, one) for one in query.must)]
    if query.where:
        join = sa.or_ if query.any_of else sa.and_
        found.append(join(*(_condition(table, one) for one in query.where)))
    return sa.and_(*found)


def _column(table: sa.Table, name: str) -> sa.Column[Any]:
    if name not in table.c or name in ("run_id", "body"):
        raise InputError(f"a question about {table.name} names {name!r}, which is no field of it")
    return table.c[name]


def _condition(table: sa.Table, condition: Condition) -> sa.ColumnElement[bool]:
    column = _column(table, condition.field)
    if condition.contains is not None:
        part = sa.bindparam(None, condition.contains, type_=column.type)
        return (
            sa.func.strpos(sa.cast(column, sa.Text) if not _is_text(column) else column, part) > 0
        )
    values = condition.is_in or ()
    given = [value for value in values if value is not None]
    if not given and values:
        return column.is_(None)  # alone, so that an index is used
    if len(given) == 1:
        found: sa.ColumnElement[bool] = column == sa.bindparam(None, given[0], type_=column.type)
    else:
        found = any_of(column, given)
    return sa.or_(found, column.is_(None)) if None in values else found


def _is_text(column: sa.Column[Any]) -> bool:
    return isinstance(column.type, Exact)


def _behind(query: Query) -> list[list[sa.ColumnElement[bool]]]:
    """Conditions of the parts of the list behind `after`, in their order: None sorts first, last where descending."""
    if query.after is None:
        return [[]]
    table = TABLES[query.kind]
    column, key = _column(table, query.order_by), table.c.key
    value, last_key = query.after
    if query.order_by == "key":
        return [[key < last_key if query.descending else key > last_key]]
    if value is None:
        if query.descending:
            return [[column.is_(None), key < last_key]]
        return [[column.is_(None), key > last_key], [column.isnot(None)]]
    place = sa.tuple_(column, key)
    last = sa.tuple_(
        sa.bindparam(None, value, type_=column.type),
        sa.bindparam(None, last_key, type_=key.type),
    )
    if not query.descending:
        return [[place > last]]
    parts: list[list[sa.ColumnElement[bool]]] = [[place < last]]
    return [*parts, [column.is_(None)]] if column.nullable else parts


def _ordered(select: sa.Select[Any], columns: Any, query: Query) -> sa.Select[Any]:
    column, key = columns[query.order_by], columns.key
    if query.order_by == "key":
        return select.order_by(key.desc() if query.descending else key)
    if query.descending:
        return select.order_by(column.desc().nulls_last(), key.desc())
    return select.order_by(column.asc().nulls_first(), key)


def totals(run_id: str, rollout_ids: Sequence[str]) -> sa.Select[Any]:
    """(rollout, attempt, number of spans, last sequence id, bytes) per attempt. Rollout by rollout: a range of the index each."""
    ids = array_of(list(dict.fromkeys(rollout_ids)), SPANS.c.rollout_id.type)
    wanted = sa.func.unnest(ids).table_valued("rollout_id", name="wanted").render_derived()
    sums = (
        sa.cast(sa.func.sum(SPANS.c.number), sa.BigInteger).label("number"),
        sa.func.max(SPANS.c.first + SPANS.c.number - 1).label("last"),
        sa.cast(sa.func.sum(SPANS.c.size), sa.BigInteger).label("size"),
    )
    where = (SPANS.c.run_id == run_id, SPANS.c.rollout_id == wanted.c.rollout_id)
    attempts = sa.select(SPANS.c.rollout_id, SPANS.c.attempt_id, *sums).where(*where)
    grouped = attempts.group_by(SPANS.c.rollout_id, SPANS.c.attempt_id).lateral()
    return sa.select(*grouped.c).select_from(wanted.join(grouped, sa.true()))


def spans_of(run_id: str, keys: Sequence[tuple[str, str]], names: Sequence[str]) -> sa.Select[Any]:
    """Columns `names` of the spans of these attempts, attempt by attempt."""
    kept = SPANS.c.rollout_id.type
    columns = (array_of([key[0] for key in keys], kept), array_of([key[1] for key in keys], kept))
    pairs = sa.func.unnest(*columns).table_valued(
        "rollout_id", "attempt_id", with_ordinality="place", name="wanted"
    )
    wanted = pairs.render_derived()
    same = sa.and_(
        SPANS.c.run_id == run_id,
        SPANS.c.rollout_id == wanted.c.rollout_id,
        SPANS.c.attempt_id == wanted.c.attempt_id,
    )
    select = sa.select(*(SPANS.c[name] for name in names)).select_from(wanted.join(SPANS, same))
    return select.order_by(wanted.c.place, SPANS.c.first)
