"""The reading half of the core: single records, waits and sums, answered when what they show is in the journal.

Who calls it: `agl_ray.store.lists` builds on it. Test alone: tests/unit/test_store_core.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from agl_ray.store.base import CoreBase, rollouts
from agl_ray.store.checks import is_id
from agl_ray.store.rows import record_of
from agl_ray.types import Attempt, EventPage, ResourcesUpdate, Rollout, Worker

MOST_LOADED = 1000  # rollouts that one question brings to memory at a time


class Reads(CoreBase):
    """Questions; unknown ids are None or NotFound as `LightningStore` says."""

    async def wait_for_rollouts(
        self, rollout_ids: Sequence[str], timeout: float | None, min_count: int | None
    ) -> tuple[list[Rollout], bool]:
        """The final ones among `rollout_ids`, as soon as all known ones (or `min_count`) are, or at `timeout` seconds; and
        whether they are enough."""
        self._check()
        known = await self._rollouts(rollout_ids)
        open_ids = [one.rollout_id for one in known if not one.status.final]
        wanted = len(known) if min_count is None else min(min_count, len(known))
        need = wanted - (len(known) - len(open_ids))
        if need > 0 and (timeout is None or timeout > 0):
            await self._finals.wait(open_ids, need, timeout)
            self._check()
            known = await self._rollouts(rollout_ids)
        final: list[Rollout] = [one for one in known if one.status.final]
        await self._committed(None)
        return final, len(final) >= wanted

    async def _rollouts(self, rollout_ids: Iterable[str]) -> list[Rollout]:
        """The known ones among them, in order, each once, as they are at the moment of the return. What is not in memory is read
        and not kept."""
        state = self.machine.state
        ids = list(dict.fromkeys(rollout_ids))
        missing = [one for one in ids if one not in state.rollouts and is_id(one)]
        if not missing:
            return [state.rollouts[one] for one in ids if one in state.rollouts]
        keys = rollouts(missing)
        state.residents.pin(
            keys
        )  # who comes to memory meanwhile has the newer word, and stays to say it
        try:
            rows = await self._journal.rows("rollout", missing)
            found = {row.key: record_of(row, Rollout) for row in rows}
            found |= {one: state.rollouts[one] for one in ids if one in state.rollouts}
            return [found[one] for one in ids if one in found]
        finally:
            state.residents.unpin(keys)
            state.shrink()

    async def get_rollout(self, rollout_id: str) -> Rollout | None:
        self._check()
        found = await self._rollouts([rollout_id])
        return await self._committed(found[0] if found else None)

    async def get_rollout_in_full(
        self, rollout_id: str
    ) -> tuple[Rollout, Attempt | None, ResourcesUpdate | None] | None:
        """The rollout, its latest attempt and its resources (the latest ones where it names none), of one moment."""
        self._check()
        state = self.machine.state
        async with self._present(rollouts([rollout_id])):
            named = (
                state.rollouts[rollout_id].resources_id if rollout_id in state.rollouts else None
            )
            async with self._present([] if named is None else [("resources", named)]):
                rollout = state.rollouts.get(rollout_id)
                if rollout is None:
                    return await self._committed(None)
                resources = (
                    state.latest_resources() if named is None else state.resources.get(named)
                )
                answer = (rollout, state.latest(rollout_id), resources)
        return await self._committed(answer)

    async def get_attempt(self, rollout_id: str, attempt_id: str) -> Attempt:
        self._check()
        async with self._present(rollouts([rollout_id])):
            found = self.machine.state.attempt(rollout_id, attempt_id)
        return await self._committed(found)

    async def get_latest_attempt(self, rollout_id: str) -> Attempt | None:
        self._check()
        async with self._present(rollouts([rollout_id])):
            found = self.machine.state.latest(rollout_id)
        return await self._committed(found)

    async def get_attempts(self, rollout_ids: Sequence[str]) -> list[Attempt]:
        """The latest attempt of each rollout; rollouts without one are left out, unknown ones are NotFound."""
        self._check()
        state = self.machine.state
        latest: list[Attempt | None] = []
        for start in range(0, len(rollout_ids), MOST_LOADED):
            some = rollout_ids[start : start + MOST_LOADED]
            async with self._present(rollouts(some)):
                latest += [state.latest(state.rollout(one).rollout_id) for one in some]
        await self._committed(None)
        return [one for one in latest if one is not None]

    async def query_attempts(self, rollout_id: str) -> list[Attempt]:
        """All attempts of a rollout in order."""
        self._check()
        async with self._present(rollouts([rollout_id])):
            self.machine.state.rollout(rollout_id)
            rows = list(self.machine.state.attempts.get(rollout_id, {}).values())
        return await self._committed(rows)

    async def query_workers(self) -> list[Worker]:
        self._check()
        return await self._committed(list(self.machine.state.workers.values()))

    async def get_resources(self, resources_id: str | None) -> ResourcesUpdate | None:
        """The snapshot of this id, or the latest (None)."""
        self._check()
        state = self.machine.state
        if resources_id is None:
            return await self._committed(state.latest_resources())
        async with self._present([("resources", resources_id)]):
            found = state.resources.get(resources_id)
        return await self._committed(found)

    async def get_state(self, key: str) -> bytes | None:
        self._check()
        async with self._present([("state", key)]):
            found = self.machine.state.values.get(key)
        return await self._committed(found)

    async def list_state(self, prefix: str) -> list[str]:
        self._check()
        await self._committed(None)
        return await self._journal.keys("state", prefix)

    async def wait_for_queue(self, standing: float, wait_seconds: float) -> int:
        """How many rollouts wait, once some have for `standing` seconds without a break; 0 after `wait_seconds`."""
        self._check()
        return await self._backlog.wait(standing, wait_seconds)

    async def ping(self) -> float:
        """Seconds that this store has been up."""
        self._check()
        return self.now() - self._opened_at

    async def read_events(self, after: int, limit: int, wait_seconds: float) -> EventPage:
        """Changes of state behind number `after`, once they are journalled; waits up to `wait_seconds` for the first."""
        self._check()
        return await self._events.read(after, limit, wait_seconds)

    async def statistics(self) -> dict[str, Any]:
        self._check()
        state = self.machine.state
        counts = state.counts()
        await self._committed(None)
        return {
            **counts,
            "url": self.url,
            "durable": self._journal.durable,
            "restarts": self._starts - 1,
            "uptime_seconds": self.now() - self._opened_at,
            "commits": self._group.groups,
            "cache_bytes": self._cache.size,
            "records_in_memory": len(state.residents),
            "record_bytes": state.residents.size,
            "waiting_takers": len(self._takers),
        }
