"""A `Query` as SQLite's SELECT statements.

What it is: `selects(query)`, the one or two statements whose rows, one after the other, are the answer; `counting(query)`. Two, because
an index is walked from a given place only where the place is a range of it: rows whose sort column is empty, and the others,
are two ranges. So a page costs the same wherever it begins; the exception is the range without an end time, in which the
rollouts that have not ended are looked for among all.
Who calls it: `journals.sqlite`. Test alone: tests/unit/test_store_journal_contract.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from agl_ray.store.journals.base import COLUMNS, Condition, Query
from agl_ray.store.journals.sqlite_schema import NEVER_EMPTY

Statement = tuple[str, list[Any]]


def counting(query: Query) -> Statement:
    """How many rows match, before any paging."""
    where, values = _conditions(query)
    return f"SELECT COUNT(*) FROM {query.kind}{_where(where)}", values


def selects(query: Query) -> Iterator[Statement]:
    """Statements without LIMIT; rows are (key, position, columns..., body)."""
    fields = ", ".join(["key", "position", *COLUMNS[query.kind], "body"])
    where, values = _conditions(query)
    way = "DESC" if query.descending else "ASC"
    order = f"{query.order_by} {way}, key {way}" if query.order_by != "key" else f"key {way}"
    for part, part_values in _parts(query):
        conditions = [*where, part] if part else where
        text = f"SELECT {fields} FROM {query.kind}{_where(conditions)} ORDER BY {order}"
        yield text, [*values, *part_values]


def _parts(query: Query) -> list[Statement]:
    """The ranges behind `query.after` (or all of them), in order."""
    by, than = query.order_by, "<" if query.descending else ">"
    if by in NEVER_EMPTY:
        if query.after is None:
            return [("", [])]
        value, key = query.after
        if by == "key":
            return [(f"key {than} ?", [key])]
        return [(f"({by}, key) {than} (?, ?)", [value, key])]
    empty: Statement = (f"{by} IS NULL", [])
    others: Statement = (f"{by} IS NOT NULL", [])
    parts: list[Statement] = [others, empty] if query.descending else [empty, others]
    if query.after is None:
        return parts
    value, key = query.after
    if value is None:
        behind = (f"{by} IS NULL AND key {than} ?", [key])
        return [behind, *parts[parts.index(empty) + 1 :]]
    behind = (f"{by} IS NOT NULL AND ({by}, key) {than} (?, ?)", [value, key])
    return [behind, *parts[parts.index(others) + 1 :]]


def _conditions(query: Query) -> tuple[list[str], list[Any]]:
    texts, values = [], []
    for condition in query.must:
        text, more = _condition(condition)
        texts.append(text)
        values += more
    alternatives = [_condition(condition) for condition in query.where]
    if alternatives:
        word = " OR " if query.any_of else " AND "
        texts.append("(" + word.join(text for text, _ in alternatives) + ")")
        values += [value for _, more in alternatives for value in more]
    return texts, values


def _condition(condition: Condition) -> tuple[str, list[Any]]:
    field = condition.field
    if condition.is_in is None:
        return f"instr({field}, ?) > 0", [condition.contains]
    given = [value for value in condition.is_in if value is not None]
    text, values = among(field, given)
    return (text if len(given) == len(condition.is_in) else f"({field} IS NULL OR {text})"), values


def among(field: str, given: Sequence[Any]) -> Statement:
    """The condition that `field` is one of these values (none of them None): one parameter, however many there are. Those that
    JSON in SQLite cannot carry, with a NUL, are parameters of their own."""
    odd = [value for value in given if isinstance(value, str) and "\0" in value]
    plain = [value for value in given if value not in odd] if odd else list(given)
    texts = [f"{field} = ?"] * len(odd)
    if len(plain) == 1:
        texts.append(f"{field} = ?")
    elif plain:
        texts.append(f"{field} IN (SELECT value FROM json_each(?))")
        plain = [json.dumps(plain)]
    return "(" + (" OR ".join(texts) or "0") + ")", [*odd, *plain]


def _where(conditions: list[str]) -> str:
    return " WHERE " + " AND ".join(conditions) if conditions else ""
