"""Pages of REST's lists: a cursor says where the next one begins.

Who calls it: `agl_ray.store.doors.rest`. Test alone: tests/unit/test_store_rest.py.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable
from typing import Any

import msgspec

from agl_ray.store.doors import rest_records as records
from agl_ray.store.doors.rest_routes import Malformed
from agl_ray.types import PaginatedResult

NO_CURSOR = "cursor: expected `next_cursor` of the page before, with the same filters and order"


async def paged(
    search: records.Paging,
    query: Callable[..., Any],
    shown: Callable[[Any], Any] | None = None,
    *first: Any,
) -> Any:
    """One page of `query`, its items as `shown` makes them; the cursor goes on where it ended."""
    fields = fields_of(search)
    cursor = fields.pop("cursor")
    if cursor is not None:
        fields["offset"] = _offset_of(cursor, fields)
    found: PaginatedResult[Any] = await query(*first, **fields)
    end = found.offset + len(found.items)
    more = len(found.items) > 0 and end < found.total
    items = found.items if shown is None else [shown(one) for one in found.items]
    return records.page(found, items, _cursor(end, fields) if more else None)


async def keyed(
    search: records.Paging,
    query: Callable[..., Any],
    key: str,
    shown: Callable[[Any], Any] | None = None,
    default_order: str | None = None,
) -> Any:
    """As `paged`, of records whose number grows without end: a page begins behind the last record of the one before, wherever that
    stands by then. `default_order`: the field that orders without `sort_by`; None: the store knows."""
    fields = fields_of(search)
    cursor, limit = fields.pop("cursor"), fields["limit"]
    if cursor is not None:
        fields |= {"after": _after_of(cursor, fields), "offset": 0}
    one_more = limit + 1 if limit > 0 else limit
    found: PaginatedResult[Any] = await query(**{**fields, "limit": one_more})
    items = list(found.items)[:limit] if limit > 0 else list(found.items)
    next_cursor = None
    if len(found.items) > len(items):
        order = fields["sort_by"] or default_order
        value = None if order is None else getattr(items[-1], order)
        place = msgspec.json.encode([value, getattr(items[-1], key), _print(fields)])
        next_cursor = base64.urlsafe_b64encode(place).decode()
    page = PaginatedResult(items, limit, found.offset, found.total)
    return records.page(page, items if shown is None else [*map(shown, items)], next_cursor)


def _after_of(cursor: str, fields: dict[str, Any]) -> tuple[Any, str]:
    try:
        place = base64.b64decode(cursor.encode(), b"-_", validate=True)
        value, key, mark = msgspec.json.decode(
            place, type=tuple[str | int | float | None, str, str]
        )
    except (binascii.Error, ValueError) as error:
        raise Malformed(NO_CURSOR) from error
    if mark != _print(fields):
        raise Malformed(NO_CURSOR)
    return value, key


def _cursor(offset: int, fields: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(f"{offset}.{_print(fields)}".encode()).decode()


def _offset_of(cursor: str, fields: dict[str, Any]) -> int:
    try:
        number, _, mark = base64.urlsafe_b64decode(cursor.encode()).decode().partition(".")
        offset = int(number) if number.isascii() and number.isdigit() and len(number) < 16 else -1
    except (binascii.Error, ValueError):
        offset, mark = -1, ""
    if offset < 0 or mark != _print(fields):
        raise Malformed(NO_CURSOR)
    return offset


def _print(fields: dict[str, Any]) -> str:
    """What a cursor belongs to: everything but where the page is and how long."""
    where = ("offset", "limit", "after")
    rest = {name: value for name, value in fields.items() if name not in where}
    return hashlib.sha256(msgspec.json.encode(rest, order="sorted")).hexdigest()[:16]


def fields_of(body: msgspec.Struct) -> dict[str, Any]:
    return msgspec.structs.asdict(body)
