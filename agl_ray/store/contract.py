"""The words of agent-lightning's queries, turned into questions of ours: filters, sorting, paging, and what is wrong with them.

What it is: `*_query` check what the caller gave and make a `Query` of it (None: nothing can match); `select` answers one over
records in memory. An unknown sort field or logic is an InputError that lists what is allowed; `limit` 0 is nothing, -1 is all.
Who calls it: `agl_ray.store.queries`, `agl_ray.store.span_calls`, the HTTP doors. Test alone: tests/unit/test_store_contract.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from agl_ray.store.journals.base import COLUMNS, Condition, Query
from agl_ray.types import InputError, RolloutStatus

T = TypeVar("T")
Filters = Sequence[tuple[str, Iterable[Any] | None, str | None]]
"""(field, any of these values, a part of the text); a filter whose two values are None is not there."""

After = tuple[Any, str]
"""(its value of `sort_by`, its id) of the last record of the page before. In order of creation the value is None: the store knows."""

ROLLOUT_SORTS = {
    "rollout_id": "key",
    **{name: name for name in ("start_time", "end_time", "status", "mode", "resources_id")},
}
RESOURCES_SORTS = {
    "resources_id": "key",
    **{name: name for name in ("create_time", "update_time", "version")},
}
ATTEMPT_SORTS = {
    name: name
    for name in (
        *("sequence_id", "attempt_id", "status", "end_reason", "worker_id", "reward"),
        *("start_time", "end_time", "last_heartbeat_time"),
    )
}
WORKER_SORTS = {
    name: name
    for name in (
        *("worker_id", "status", "last_heartbeat_time", "last_dequeue_time", "last_busy_time"),
        *("last_idle_time", "current_rollout_id", "current_attempt_id"),
    )
}
WORKER_STATUS = ("idle", "busy", "unknown", "lost")


def rollouts_query(
    *,
    status_in: Sequence[str] | None = None,
    rollout_id_in: Sequence[str] | None = None,
    rollout_id_contains: str | None = None,
    filter_logic: str = "and",
    mode: str | None = None,
    sort_by: str | None = None,
    sort_order: str = "asc",
    limit: int = -1,
    offset: int = 0,
    after: After | None = None,
) -> Query | None:
    """Rollouts; without `sort_by` in order of creation. `mode` always binds, `filter_logic` joins the others."""
    filters: Filters = [
        ("status", _statuses("status_in", status_in, list(RolloutStatus)), None),
        ("key", rollout_id_in, None),
        ("key", None, rollout_id_contains),
    ]
    order = _sort(sort_by, ROLLOUT_SORTS, "created")
    must = () if mode is None else (Condition("mode", (mode,)),)
    query = _query("rollout", filters, filter_logic, order, sort_order, limit, offset, must)
    return _behind(query, after)


def resources_query(
    *,
    resources_id: str | None = None,
    resources_id_contains: str | None = None,
    sort_by: str | None = None,
    sort_order: str = "asc",
    limit: int = -1,
    offset: int = 0,
    after: After | None = None,
) -> Query | None:
    """Snapshots; without `sort_by` in order of creation."""
    exact = None if resources_id is None else [resources_id]
    filters: Filters = [("key", exact, None), ("key", None, resources_id_contains)]
    order = _sort(sort_by, RESOURCES_SORTS, "create_time")
    query = _query("resources", filters, "and", order, sort_order, limit, offset)
    return _behind(query, after)


def attempts_query(
    *, sort_by: str | None = "sequence_id", sort_order: str = "asc", limit: int, offset: int
) -> Query | None:
    """Attempts of one rollout, for `select`."""
    order = _sort(sort_by, ATTEMPT_SORTS, "sequence_id")
    return _query("attempt", (), "and", order, sort_order, limit, offset)


def workers_query(
    *,
    status_in: Sequence[str] | None = None,
    worker_id_contains: str | None = None,
    filter_logic: str = "and",
    sort_by: str | None = None,
    sort_order: str = "asc",
    limit: int = -1,
    offset: int = 0,
) -> Query | None:
    """Workers, for `select`; without `sort_by` by id."""
    filters: Filters = [
        ("status", _statuses("status_in", status_in, WORKER_STATUS), None),
        ("worker_id", None, worker_id_contains),
    ]
    order = _sort(sort_by, WORKER_SORTS, "worker_id")
    return _query("worker", filters, filter_logic, order, sort_order, limit, offset)


def _query(
    kind: str,
    filters: Filters,
    filter_logic: str,
    order_by: str,
    sort_order: str,
    limit: int,
    offset: int,
    must: tuple[Condition, ...] = (),
) -> Query | None:
    check_page(limit, offset)
    any_of = check_logic(filter_logic)
    where: list[Condition] = []
    impossible = False  # a choice among no values
    for field, values, part in filters:
        if values is not None:
            chosen = tuple(dict.fromkeys(values))
            impossible = impossible or not chosen
            where += [Condition(field, chosen)] if chosen else []
        if part is not None:
            where.append(Condition(field, contains=part))
    if impossible and not (any_of and where):
        return None
    return Query(
        kind,
        must=must,
        where=tuple(where),
        any_of=any_of,
        order_by=order_by,
        descending=check_order(sort_order),
        limit=limit,
        offset=offset,
        count=True,
    )


def _behind(query: Query | None, after: After | None) -> Query | None:
    """Only what is behind `after`, in the order of the query."""
    if query is None or after is None:
        return query
    value, key = after
    value = str(value) if isinstance(value, str) else value  # a status is plain text from here on
    columns = {**COLUMNS[query.kind], "key": str, "created": type(None)}
    kind = columns[query.order_by]
    fits = value is None or type(value) is kind or (kind is float and type(value) is int)
    if not fits or not isinstance(key, str):
        raise InputError(
            "after: expected the last record of the page before, as (its value of `sort_by`, its id) or, in order of creation, "
            f"(None, its id), got {after!r}"
        )
    return query._replace(after=(value, key))


def select(
    query: Query | None, records: Iterable[T], field_of: Callable[[T, str], Any]
) -> tuple[list[T], int]:
    """The page of `records` that `query` asks for, and how many match. `after` is a journal's matter and not looked at."""
    if query is None:
        return [], 0
    found = [one for one in records if _matches(query, one, field_of)]
    found.sort(key=lambda one: sort_key(field_of(one, query.order_by)), reverse=query.descending)
    return cut(found, query.limit, query.offset), len(found)


def _matches(query: Query, record: T, field_of: Callable[[T, str], Any]) -> bool:
    def holds(condition: Condition) -> bool:
        value = field_of(record, condition.field)
        if condition.is_in is not None:
            return value in condition.is_in
        return value is not None and (condition.contains or "") in value

    if not all(map(holds, query.must)):
        return False
    if not query.where:
        return True
    return any(map(holds, query.where)) if query.any_of else all(map(holds, query.where))


def sort_key(value: Any) -> tuple[bool, Any]:
    """None first."""
    return (value is not None, 0 if value is None else value)


def cut(found: list[T], limit: int, offset: int) -> list[T]:
    return found[offset:] if limit < 0 else found[offset : offset + limit]


def check_page(limit: int, offset: int) -> None:
    if not isinstance(limit, int) or limit < -1:
        raise InputError(f"limit: expected -1 (all), 0 or a positive number, got {limit!r}")
    if not isinstance(offset, int) or offset < 0:
        raise InputError(f"offset: expected 0 or a positive number, got {offset!r}")


def check_logic(filter_logic: str) -> bool:
    """Whether one filter is enough."""
    if filter_logic not in ("and", "or"):
        raise InputError(f"filter_logic: expected 'and' or 'or', got {filter_logic!r}")
    return filter_logic == "or"


def check_order(sort_order: str) -> bool:
    """Whether it descends."""
    if sort_order not in ("asc", "desc"):
        raise InputError(f"sort_order: expected 'asc' or 'desc', got {sort_order!r}")
    return sort_order == "desc"


def check_sort(sort_by: str, allowed: Iterable[str]) -> None:
    names = sorted(allowed)
    if sort_by not in names:
        raise InputError(f"sort_by: expected one of {names}, got {sort_by!r}")


def _sort(sort_by: str | None, allowed: Mapping[str, str], default: str) -> str:
    if sort_by is None:
        return default
    check_sort(sort_by, allowed)
    return allowed[sort_by]


def _statuses(
    field: str, given: Sequence[str] | None, known: Sequence[str]
) -> tuple[str, ...] | None:
    if given is None:
        return None
    chosen = [given] if isinstance(given, str) else given
    for one in chosen:
        if one not in known:
            raise InputError(f"{field}: expected some of {[*map(str, known)]}, got {one!r}")
    return tuple(map(str, chosen))


def statistics_of(counts: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The counts of the store with agent-lightning's keys beside them."""
    return {
        **counts,
        "name": name,
        "total_rollouts": counts["rollouts"],
        "total_attempts": counts["attempts"],
        "total_spans": counts["spans"],
        "total_resources": counts["resources"],
        "total_workers": counts["workers"],
        "total_span_bytes": counts["span_bytes"],
        "uptime": counts["uptime_seconds"],
    }
