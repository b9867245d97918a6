"""Answers to `Query` in plain Python, over rows that are in memory.

What it is: `answer(query, rows)`, the meaning of a query in the fewest words; journals with an index answer the same way, faster.
Who calls it: `journals.memory`, `agl_ray.store.reads` (workers). Test alone: tests/unit/test_store_journal_contract.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from agl_ray.store.journals.base import COLUMNS, Condition, Page, Query, Row


def answer(query: Query, rows: Iterable[Row]) -> Page:
    """The page of `rows` (all of `query.kind`) that `query` asks for."""
    found = [row for row in rows if _matches(query, row)]
    total = len(found) if query.count else None
    value = getter(query.kind, query.order_by)

    def place(of: Any, key: str) -> tuple[bool, Any, str]:
        return (of is not None, 0 if of is None else of, key)

    found.sort(key=lambda row: place(value(row), row.key), reverse=query.descending)
    if query.after is not None:
        behind = place(*query.after)
        if query.descending:
            found = [row for row in found if place(value(row), row.key) < behind]
        else:
            found = [row for row in found if place(value(row), row.key) > behind]
    end = None if query.limit < 0 else query.offset + query.limit
    return Page(found[query.offset : end], total)


def getter(kind: str, field: str) -> Callable[[Row], Any]:
    """Reads `field` (`key`, `position` or a column) of a row of this kind."""
    if field in ("key", "position"):
        return lambda row: getattr(row, field)
    place = list(COLUMNS[kind]).index(field)
    return lambda row: row.columns[place]


def _matches(query: Query, row: Row) -> bool:
    if not all(_holds(query.kind, one, row) for one in query.must):
        return False
    held = (_holds(query.kind, one, row) for one in query.where)
    return not query.where or (any(held) if query.any_of else all(held))


def _holds(kind: str, condition: Condition, row: Row) -> bool:
    value = getter(kind, condition.field)(row)
    if condition.is_in is not None:
        return value in condition.is_in
    return value is not None and str(condition.contains) in value
