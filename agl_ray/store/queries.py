"""The reading half of the client: single records by id, lists by filter, order and page.

What it is: agent-lightning's getters and `query_*`. A list is a `PaginatedResult`; what is unknown is None or an empty list, what is asked
wrongly is an InputError.
Who calls it: `agl_ray.store.client.LightningStore` inherits it. Test alone: tests/store_catalogue/queries.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agl_ray.store import contract
from agl_ray.store.caller import StoreCaller
from agl_ray.store.journals.base import Condition, Query
from agl_ray.types import (
    Attempt,
    AttemptedRollout,
    NotFound,
    PaginatedResult,
    ResourcesUpdate,
    Rollout,
    Worker,
)

IDS_AT_ONCE = 500  # rollouts whose attempts are asked for in one question


class StoreQueries(StoreCaller):
    """Reads of records. In every list: `limit` -1 = all, 0 = none; `sort_order` asc or desc, what is empty comes first."""

    async def get_latest_resources(self) -> ResourcesUpdate | None:
        return await self._call("get_resources", None)

    async def get_resources_by_id(self, resources_id: str) -> ResourcesUpdate | None:
        return await self._call("get_resources", resources_id)

    async def query_resources(
        self,
        *,
        resources_id: str | None = None,
        resources_id_contains: str | None = None,
        sort_by: str | None = None,
        sort_order: str = "asc",
        limit: int = -1,
        offset: int = 0,
        after: contract.After | None = None,
    ) -> PaginatedResult[ResourcesUpdate]:
        """Snapshots, in order of creation unless `sort_by` says otherwise; both filters must hold. `after`: as in `query_rollouts`, by
        `create_time` without `sort_by`."""
        query = contract.resources_query(
            resources_id=resources_id,
            resources_id_contains=resources_id_contains,
            sort_by=sort_by,
            sort_order=sort_order,
            limit=limit,
            offset=offset,
            after=after,
        )
        found, total = await self._find("find_resources", query)
        return PaginatedResult(found, limit, offset, total)

    async def get_rollout_by_id(self, rollout_id: str) -> Rollout | None:
        return await self._call("get_rollout", rollout_id)

    async def get_rollout_in_full(
        self, rollout_id: str
    ) -> tuple[Rollout, Attempt | None, ResourcesUpdate | None] | None:
        """The rollout, its latest attempt and the resources it uses, in one call; None where the rollout is unknown."""
        return await self._call("get_rollout_in_full", rollout_id)

    async def query_rollouts(
        self,
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
        status: Sequence[str] | None = None,
        rollout_ids: Sequence[str] | None = None,
        after: contract.After | None = None,
    ) -> PaginatedResult[Rollout | AttemptedRollout]:
        """Rollouts with their latest attempt (plain where there is none), in order of creation unless `sort_by` says otherwise.

        filter_logic: whether all of the filters must hold (`and`) or one (`or`); `mode` always binds. `status`, `rollout_ids`: older
        names of `status_in`, `rollout_id_in`, which win. after: only what is behind the last rollout of the page before, given as (its
        value of `sort_by`, its id), or (None, its id) in order of creation: no page costs more than the first, and none is skipped when
        earlier ones change; NotFound where that rollout is gone.
        """
        query = contract.rollouts_query(
            status_in=status if status_in is None else status_in,
            rollout_id_in=rollout_ids if rollout_id_in is None else rollout_id_in,
            rollout_id_contains=rollout_id_contains,
            filter_logic=filter_logic,
            mode=mode,
            sort_by=sort_by,
            sort_order=sort_order,
            limit=limit,
            offset=offset,
            after=after,
        )
        found, total = await self._find("find_rollouts", query)
        latest = await self._latest_of([one.rollout_id for one in found if one.num_attempts])
        items: list[Rollout | AttemptedRollout] = [
            AttemptedRollout(rollout=one, attempt=latest[one.rollout_id])
            if one.rollout_id in latest
            else one
            for one in found
        ]
        return PaginatedResult(items, limit, offset, total)

    async def _find(self, command: str, query: Query | None) -> tuple[list[Any], int]:
        """The page and how many match; None can match nothing. A page without rows (`limit` 0) is asked for its total."""
        if query is None:
            return [], 0
        found, total = await self._call(command, query)
        return found, total or 0

    async def _latest_of(self, rollout_ids: Sequence[str]) -> dict[str, Attempt]:
        """By rollout its latest attempt."""
        return {one.rollout_id: one for one in await self.attempts_of(rollout_ids)}

    async def attempts_of(self, rollout_ids: Sequence[str]) -> list[Attempt]:
        """All attempts of these rollouts, those of a rollout in order; unknown rollouts have none."""
        found: list[Attempt] = []
        for start in range(0, len(rollout_ids), IDS_AT_ONCE):
            some = tuple(rollout_ids[start : start + IDS_AT_ONCE])
            query = Query("attempt", must=(Condition("rollout_id", some),), order_by="position")
            found += (await self._call("find_attempts", query))[0]
        return found

    async def get_attempt(self, rollout_id: str, attempt_id: str) -> Attempt:
        """NotFound where it is unknown; `attempt_id` may be `latest`."""
        return await self._call("get_attempt", rollout_id, attempt_id)

    async def get_latest_attempt(self, rollout_id: str) -> Attempt | None:
        return await self._call("get_latest_attempt", rollout_id)

    async def get_attempts(self, rollout_ids: Sequence[str]) -> list[Attempt]:
        """The latest attempt of each rollout, in order; rollouts without one are left out, unknown ones are NotFound."""
        return await self._call("get_attempts", list(rollout_ids))

    async def query_attempts(
        self,
        rollout_id: str,
        *,
        sort_by: str | None = "sequence_id",
        sort_order: str = "asc",
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[Attempt]:
        """The attempts of a rollout; none where it is unknown."""
        query = contract.attempts_query(
            sort_by=sort_by, sort_order=sort_order, limit=limit, offset=offset
        )
        try:
            rows = await self._call("query_attempts", rollout_id)
        except NotFound:
            rows = []
        found, total = contract.select(query, rows, getattr)
        return PaginatedResult(found, limit, offset, total)

    async def get_worker_by_id(self, worker_id: str) -> Worker | None:
        rows = await self._call("query_workers")
        return next((one for one in rows if one.worker_id == worker_id), None)

    async def query_workers(
        self,
        *,
        status_in: Sequence[str] | None = None,
        worker_id_contains: str | None = None,
        filter_logic: str = "and",
        sort_by: str | None = None,
        sort_order: str = "asc",
        limit: int = -1,
        offset: int = 0,
    ) -> PaginatedResult[Worker]:
        """Workers, by id unless `sort_by` says otherwise. status_in: some of idle, busy, unknown, lost."""
        query = contract.workers_query(
            status_in=status_in,
            worker_id_contains=worker_id_contains,
            filter_logic=filter_logic,
            sort_by=sort_by,
            sort_order=sort_order,
            limit=limit,
            offset=offset,
        )
        found, total = contract.select(query, await self._call("query_workers"), getattr)
        return PaginatedResult(found, limit, offset, total)

    async def statistics(self) -> dict[str, Any]:
        """Counts of records by status and by end reason, spans and their bytes, queue length, uptime, restarts; and under
        agent-lightning's names: name, total_rollouts, total_attempts, total_spans, total_resources, total_workers,
        total_span_bytes, uptime."""
        return contract.statistics_of(await self._call("statistics"), type(self).__name__)
