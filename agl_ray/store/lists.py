"""Lists of records: questions that the journal's indexes answer, so that they cost the same however long the history is.

What it is: an answer is what the journal holds once everything acknowledged or seen before is in it. What a journal is not told
(heartbeats, leases, span counts) is laid over it from memory, or summed up from the spans.
Who calls it: `agl_ray.store.core.StoreCore` builds on it. Test alone: tests/unit/test_store_bounded.py.
"""

from __future__ import annotations

from agl_ray.store.journals.base import COLUMNS, Page, Query
from agl_ray.store.reads import Reads
from agl_ray.store.rows import record_of
from agl_ray.types import (
    Attempt,
    NotFound,
    ResourcesUpdate,
    Rollout,
    RolloutStatus,
    replace,
)

CREATED = [*COLUMNS["rollout"]].index("created")  # its place among the columns
COUNTED = {"status", "mode"}


class Lists(Reads):
    """`find_*`: records and, where `query.count`, how many match without `after`, `offset` and `limit`."""

    async def find_rollouts(self, query: Query) -> tuple[list[Rollout], int | None]:
        page = await self._page(query)
        return [record_of(row, Rollout) for row in page.rows], page.total

    async def find_resources(self, query: Query) -> tuple[list[ResourcesUpdate], int | None]:
        page = await self._page(query)
        return [record_of(row, ResourcesUpdate) for row in page.rows], page.total

    async def find_attempts(self, query: Query) -> tuple[list[Attempt], int | None]:
        page = await self._page(query)
        found = [record_of(row, Attempt) for row in page.rows]
        held = self.machine.state.attempts
        away = list(dict.fromkeys(one.rollout_id for one in found if one.rollout_id not in held))
        totals = {
            one.key: one.number for one in (await self._journal.span_totals(away) if away else ())
        }
        return await self._committed([self._told(one, totals) for one in found]), page.total

    def _told(self, attempt: Attempt, totals: dict[tuple[str, str], int]) -> Attempt:
        """With what the journal is not told."""
        key = (attempt.rollout_id, attempt.attempt_id)
        now = self.machine.state.attempts.get(key[0], {}).get(key[1])
        if now is None:
            return replace(attempt, num_spans=totals.get(key, attempt.num_spans))
        if attempt.end_reason is not None or now.end_reason is not None:
            return replace(attempt, num_spans=now.num_spans)
        return now

    async def _page(self, query: Query) -> Page:
        self._check()
        await self._committed(None)
        query = await self._placed(query)
        total = self._counted(query) if query.count else None
        if total is None:
            return await self._journal.query(query)
        page = await self._journal.query(query._replace(count=False))
        return Page(page.rows, total)

    def _counted(self, query: Query) -> int | None:
        """How many rollouts match, where only status and mode are asked for: those are counted as they change. None: ask the journal."""
        conditions = (*query.must, *query.where)
        fields = {one.field for one in conditions if one.is_in is not None}
        if query.kind != "rollout" or len(fields) < len(conditions) or not fields <= COUNTED:
            return None
        if query.any_of and len(query.where) > 1:
            return None
        state = self.machine.state
        wanted = {one.field: set(one.is_in or ()) for one in conditions}
        status = wanted.get("status", set(RolloutStatus))
        if "mode" not in wanted:
            return sum(state.rollouts_by_status[one] for one in status)
        if state.rollouts_by_mode is None:
            return None
        return sum(
            number
            for (known, mode), number in state.rollouts_by_mode.items()
            if known in status and mode in wanted["mode"]
        )

    async def _placed(self, query: Query) -> Query:
        """With the ordinal of the rollout that a page in order of creation is to go on behind: callers know its id only."""
        if query.order_by != "created":
            return query
        if query.after is None:
            return self._skipped(query)
        if query.after[0] is not None:
            return query
        rows = await self._journal.rows("rollout", [query.after[1]])
        if not rows:
            raise NotFound(f"rollout {query.after[1]!r}: not in the store, so nothing is behind it")
        return query._replace(after=(rows[0].columns[CREATED], query.after[1]))

    def _skipped(self, query: Query) -> Query:
        """With the offset of a page of all rollouts as a place to go on behind: where none was ever forgotten, the ordinals have no gap."""
        state = self.machine.state
        alone = not (query.must or query.where)
        if not (alone and query.offset) or state.rollouts_by_status.total() < state.last_created:
            return query
        # No key is as small as "": going up, the first of the page itself is behind its ordinal with it.
        place = state.last_created - query.offset if query.descending else query.offset
        return query._replace(after=(place + 1, ""), offset=0)
