"""The cursor of agent-lightning 1.0 over rollouts that have ended, in order of their completion.

What it is: the cursor is the time of completion as an integer (exact: a double of our century is a whole number of 2**-22 seconds, and
below 2**53). Rollouts that ended in one moment ended in one commit and come in one page, so whoever passes `next_after` back sees each
completion once, also when rollouts were deleted meanwhile or the server was started anew.
Who calls it: `agl_ray.store.doors.facade`. Test alone: tests/unit/test_store_facade.py.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from agl_ray.store.client import LightningStore
from agl_ray.store.doors.facade_records import Terminal, terminal_of
from agl_ray.types import AttemptedRollout, Rollout, RolloutStatus

FINAL = [status for status in RolloutStatus if status.final]
_SCALE = 2**22
_HINTS = 1024  # cursors whose place is remembered


class TerminalPage(msgspec.Struct):
    items: list[Terminal]
    next_after: int
    total_terminal: int


class Terminals:
    """Pages over the store's final rollouts, oldest completion first."""

    def __init__(self, store: LightningStore) -> None:
        self._store = store
        self._places: OrderedDict[int, int] = OrderedDict()  # cursor -> how many are not behind it

    async def page(self, after: int, limit: int) -> TerminalPage:
        """`limit` rollouts that ended behind the cursor, and those that ended in the same moment as the last of them."""
        start, total, items = await self._behind(after, limit + 1)
        while len(items) > limit and start + len(items) < total:
            if cursor_of(items[-1]) != cursor_of(items[limit - 1]):
                break
            _, more = await self._read(start + len(items), limit + 1)
            items += more
            if not more:
                break
        if len(items) > limit:
            end = cursor_of(items[limit - 1])
            items = [one for one in items if cursor_of(one) <= end]
        following = cursor_of(items[-1]) if items else after
        self._remember(following, start + len(items))
        return TerminalPage([terminal_of(one) for one in items], following, total)

    async def _behind(self, after: int, number: int) -> tuple[int, int, list[Rollout]]:
        """(place of the first, how many there are in all, `number` rollouts from there on) of those that ended behind `after`."""
        start = self._places.get(after) if after else 0
        while True:
            if start is None:
                start = await self._search(after)
            # One more to the left: it shows whether this still is the place, should rollouts have been deleted.
            left = min(start, 1)
            total, items = await self._read(start - left, number + left)
            fits = all(cursor_of(one) > after for one in items[left:])
            if fits and (not left or (items and cursor_of(items[0]) <= after)):
                return start, total, items[left:]
            start = None

    async def _search(self, after: int) -> int:
        """How many ended no later than the cursor, by halving."""
        low, (high, _) = 0, await self._read(0, 1)
        while low < high:
            middle = (low + high) // 2
            _, found = await self._read(middle, 1)
            if found and cursor_of(found[0]) <= after:
                low = middle + 1
            else:
                high = middle
        return low

    def _remember(self, cursor: int, place: int) -> None:
        self._places[cursor] = place
        self._places.move_to_end(cursor)
        if len(self._places) > _HINTS:
            self._places.popitem(last=False)

    async def _read(self, offset: int, limit: int) -> tuple[int, list[Rollout]]:
        """(how many have ended, `limit` of them from `offset` on in order of completion)."""
        page = await self._store.query_rollouts(
            status_in=FINAL, sort_by="end_time", limit=limit, offset=offset
        )
        plain = [one.rollout if isinstance(one, AttemptedRollout) else one for one in page]
        return page.total, plain


def cursor_of(rollout: Rollout) -> int:
    """The moment of a final rollout's end."""
    return round((rollout.end_time or 0.0) * _SCALE)
