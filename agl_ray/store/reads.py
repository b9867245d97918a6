"""The reading half of the core: questions about records, answered when what they show is in the journal.

Who calls it: `agl_ray.store.core.StoreCore` builds on it. Test alone: tests/unit/test_store_core.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agl_ray.store.base import CoreBase
from agl_ray.types import Attempt, ResourcesUpdate, Rollout, RolloutStatus, Worker


class Reads(CoreBase):
    """Questions; unknown ids are None or NotFound as `LightningStore` says."""

    async def wait_for_rollouts(
        self, rollout_ids: Sequence[str], timeout: float | None, min_count: int | None
    ) -> tuple[list[Rollout], bool]:
        """The final ones among `rollout_ids`, as soon as all known ones (or `min_count`) are, or at `timeout` seconds; and
        whether they are enough."""
        self._check()
        known = self.machine.state.in_order(dict.fromkeys(rollout_ids))
        open_ids = [one.rollout_id for one in known if not one.status.final]
        wanted = len(known) if min_count is None else min(min_count, len(known))
        need = wanted - (len(known) - len(open_ids))
        if need > 0 and (timeout is None or timeout > 0):
            await self._finals.wait(open_ids, need, timeout)
        self._check()
        now = self.machine.state.in_order(dict.fromkeys(rollout_ids))
        final: list[Rollout] = [one for one in now if one.status.final]
        await self._committed(None)
        return final, len(final) >= wanted

    async def get_rollout(self, rollout_id: str) -> Rollout | None:
        self._check()
        return await self._committed(self.machine.state.rollouts.get(rollout_id))

    async def get_rollout_in_full(
        self, rollout_id: str
    ) -> tuple[Rollout, Attempt | None, ResourcesUpdate | None] | None:
        """The rollout, its latest attempt and its resources (the latest ones where it names none), of one moment."""
        self._check()
        state = self.machine.state
        rollout = state.rollouts.get(rollout_id)
        if rollout is None:
            return await self._committed(None)
        named = rollout.resources_id
        resources = state.latest_resources() if named is None else state.resources.get(named)
        return await self._committed((rollout, state.latest(rollout_id), resources))

    async def query_rollouts(
        self,
        status_in: Sequence[RolloutStatus] | None,
        rollout_id_in: Sequence[str] | None,
        mode: str | None,
        limit: int,
        offset: int,
    ) -> list[Rollout]:
        """In order of creation (of the given ids where those are given); `limit` -1 = all."""
        self._check()
        state = self.machine.state
        rows = (
            list(state.rollouts.values())
            if rollout_id_in is None
            else state.in_order(rollout_id_in)
        )
        if status_in is not None:
            wanted = frozenset(status_in)
            rows = [row for row in rows if row.status in wanted]
        if mode is not None:
            rows = [row for row in rows if row.mode == mode]
        rows = rows[offset:] if limit < 0 else rows[offset : offset + limit]
        await self._committed(None)
        return rows

    async def get_attempt(self, rollout_id: str, attempt_id: str) -> Attempt:
        self._check()
        return await self._committed(self.machine.state.attempt(rollout_id, attempt_id))

    async def get_latest_attempt(self, rollout_id: str) -> Attempt | None:
        self._check()
        return await self._committed(self.machine.state.latest(rollout_id))

    async def get_attempts(self, rollout_ids: Sequence[str]) -> list[Attempt]:
        """The latest attempt of each rollout; rollouts without one are left out, unknown ones are NotFound."""
        self._check()
        state = self.machine.state
        latest = [state.latest(state.rollout(rollout_id).rollout_id) for rollout_id in rollout_ids]
        await self._committed(None)
        return [one for one in latest if one is not None]

    async def query_attempts(self, rollout_id: str) -> list[Attempt]:
        """All attempts of a rollout in order."""
        self._check()
        self.machine.state.rollout(rollout_id)
        rows = list(self.machine.state.attempts.get(rollout_id, {}).values())
        await self._committed(None)
        return rows

    async def query_workers(self) -> list[Worker]:
        self._check()
        rows = list(self.machine.state.workers.values())
        await self._committed(None)
        return rows

    async def get_resources(self, resources_id: str | None) -> ResourcesUpdate | None:
        """The snapshot of this id, or the latest (None)."""
        self._check()
        state = self.machine.state
        if resources_id is None:
            found = state.latest_resources()
        else:
            found = state.resources.get(resources_id)
        await self._committed(None)
        return found

    async def get_state(self, key: str) -> bytes | None:
        self._check()
        return await self._committed(self.machine.state.values.get(key))

    async def list_state(self, prefix: str) -> list[str]:
        self._check()
        keys = sorted(key for key in self.machine.state.values if key.startswith(prefix))
        await self._committed(None)
        return keys

    async def ping(self) -> float:
        """Seconds that this store has been up."""
        self._check()
        return self.now() - self._opened_at

    async def statistics(self) -> dict[str, Any]:
        self._check()
        counts = self.machine.state.counts()
        await self._committed(None)
        return {
            **counts,
            "url": self.url,
            "durable": self._journal.durable,
            "restarts": self._starts - 1,
            "uptime_seconds": self.now() - self._opened_at,
            "commits": self._group.groups,
            "cache_bytes": self._cache.size,
            "waiting_takers": len(self._takers),
        }
