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
        status = _status_alone(query)
        if not query.count or status is None:
            return await self._journal.query(query)
        page = await self._journal.query(query._replace(count=False))
        counts = self.machine.state.rollouts_by_status
        return Page(page.rows, sum(counts[one] for one in status))

    async def _placed(self, query: Query) -> Query:
        """With the ordinal of the rollout that a page in order of creation is to go on behind: callers know its id only."""
        if query.order_by != "created" or query.after is None or query.after[0] is not None:
            return query
        rows = await self._journal.rows("rollout", [query.after[1]])
        if not rows:
            raise NotFound(f"rollout {query.after[1]!r}: not in the store, so nothing is behind it")
        return query._replace(after=(rows[0].columns[CREATED], query.after[1]))


def _status_alone(query: Query) -> tuple[str, ...] | None:
    """The statuses asked for, where nothing else is: the store has counted those already."""
    conditions = (*query.must, *query.where)
    if query.kind != "rollout" or len(conditions) > 1:
        return None
    if not conditions:
        return tuple(RolloutStatus)
    (condition,) = conditions
    if condition.field != "status" or condition.is_in is None:
        return None
    return tuple(dict.fromkeys(one for one in condition.is_in if one is not None))
