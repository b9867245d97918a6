"""Marks that wrappers leave in a journal, so that it is never opened without them.

What it is: a wrapper that changes what rests in a journal (`encrypted`, `outside`) keeps a row of kind `meta` there, its mark. `open_checked`
opens a journal as it was put together and compares: a mark of a wrapper that is missing now is a StoreError, before anybody
takes ciphertext for a record or a pointer for spans. A wrapper itself refuses a journal that has data and lacks its mark.
Who calls it: whoever opens the outermost journal (`agl_ray.store.base`); the wrappers. Test alone: tests/unit/test_store_encrypted.py and
tests/unit/test_store_outside.py.
"""

from __future__ import annotations

from agl_ray.store.journals.base import Journal, Live, Row
from agl_ray.types import StoreError

ENCRYPTION = "encryption"
OUTSIDE = "outside"

_ADVICE = {
    ENCRYPTION: "its records and spans are encrypted and it was opened without encryption; set store.encryption as it was, "
    "with the keys in AGL_ENCRYPTION_KEYS",
    OUTSIDE: "its span payloads are files elsewhere and it was opened as if they were inside; set store.payload to the URI "
    "of their folder",
}


async def open_checked(journal: Journal, *, must_exist: bool = False) -> Live:
    """`journal.open`, then StoreError where it has the mark of a wrapper that is not around it; it is closed then."""
    try:
        live = await journal.open(must_exist=must_exist)
        there = {row.key for row in await journal.rows("meta", list(_ADVICE))}
        for mark in sorted(there - frozenset(getattr(journal, "marks", ()))):
            raise StoreError(f"store journal: {_ADVICE[mark]}")
        return live
    except BaseException:
        await journal.close()
        raise


async def mark_of(journal: Journal, mark: str) -> Row | None:
    rows = await journal.rows("meta", [mark])
    return rows[0] if rows else None


async def is_empty(journal: Journal, live: Live) -> bool:
    """Whether an opened journal has no record, span or event yet (it may have been opened before)."""
    counted = (
        sum(live.rollouts_by_status.values()),
        sum(live.attempts_by_reason.values()),
        live.num_resources,
        len(live.workers),
        live.num_spans,
        live.last_event,
    )
    return not any(counted) and not await journal.keys("state", "")
