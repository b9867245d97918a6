"""The LightningStore in one process: its commands and spans, over `agl_ray.store.base`.

What it is: the public coroutines here and in `agl_ray.store.reads` are the wire interface; `LightningStore` documents them. Span
payloads pass beside the machine as bytes and are never opened here.
Who calls it: `actors.store.Store` (over Ray), `agl_ray.store.client.LightningStore.local` (in-process). Test alone:
tests/unit/test_store_core.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agl_ray.store.journals.base import SpanRow
from agl_ray.store.payload import Payloads, join
from agl_ray.store.reads import Reads
from agl_ray.store.state import AttemptKey, BatchEntry
from agl_ray.types import (
    AglError,
    Attempt,
    AttemptedRollout,
    EndReason,
    EnqueueRolloutRequest,
    InputError,
    NamedResources,
    ResourcesUpdate,
    Rollout,
    Worker,
)

SpanItem = tuple[str, str, str, int, bytes]
"""(rollout_id, attempt_id, batch_id, number of spans, payload)"""


class StoreCore(Reads):
    """Make it with `await StoreCore.open(url, ...)`; end it with `await close()`."""

    # Commands.

    async def add_resources(self, resources_id: str, resources: NamedResources) -> ResourcesUpdate:
        return await self._do(self.machine.add_resources, resources_id, resources)

    async def update_resources(
        self, resources_id: str, resources: NamedResources, repeated: bool = False
    ) -> ResourcesUpdate:
        return await self._do(
            self.machine.update_resources, resources_id, resources, repeated=repeated
        )

    async def enqueue(self, requests: Sequence[EnqueueRolloutRequest]) -> list[Rollout]:
        return await self._do(self.machine.enqueue, requests)

    async def dequeue(
        self, limit: int, worker_id: str | None, wait_seconds: float, request_id: str | None
    ) -> list[AttemptedRollout]:
        """Waits at most `wait_seconds` for the first rollout; then takes what is there, at most `limit`."""
        give_up = self.loop.time() + wait_seconds
        while True:
            taken = self._run(
                self.machine.dequeue, limit=limit, worker_id=worker_id, request_id=request_id
            )
            left = give_up - self.loop.time()
            if taken or left <= 0:
                return await self._committed(taken)
            self._submit()
            if not await self._takers.wait(worker_id, left):
                return []  # the worker was declared dead meanwhile

    async def start_rollout(
        self, request: EnqueueRolloutRequest, worker_id: str | None, request_id: str
    ) -> AttemptedRollout:
        return await self._do(self.machine.start_rollout, request, worker_id, request_id)

    async def start_attempt(
        self, rollout_id: str, worker_id: str | None, request_id: str
    ) -> AttemptedRollout:
        return await self._do(self.machine.start_attempt, rollout_id, worker_id, request_id)

    async def cancel_rollouts(self, rollout_ids: Sequence[str]) -> list[Rollout]:
        return await self._do(self.machine.cancel_rollouts, rollout_ids)

    async def update_rollout(self, rollout_id: str, fields: dict[str, Any]) -> Rollout:
        return await self._do(self.machine.update_rollout, rollout_id, **fields)

    async def update_attempt(
        self, rollout_id: str, attempt_id: str, fields: dict[str, Any]
    ) -> Attempt:
        return await self._do(self.machine.update_attempt, rollout_id, attempt_id, **fields)

    async def end_attempt(
        self,
        rollout_id: str,
        attempt_id: str,
        reason: EndReason,
        reward: float | None = None,
        error: str | None = None,
        expected_spans: int | None = None,
    ) -> Attempt:
        self._check()
        attempt = self.machine.state.attempt(rollout_id, attempt_id)
        if expected_spans and reason is EndReason.OK and not attempt.status.final:
            num_spans = await self._spans_of(attempt, expected_spans)
            if num_spans < expected_spans:
                reason = EndReason.LOST
                error = (
                    f"only {num_spans} of the attempt's {expected_spans} spans reached the store"
                )
        return await self._do(
            self.machine.end_attempt, rollout_id, attempt_id, reason, reward=reward, error=error
        )

    async def _spans_of(self, attempt: Attempt, expected: int) -> int:
        """How many spans of `attempt` are here, once there are `expected` or the time for stragglers is over."""
        key = (attempt.rollout_id, attempt.attempt_id)
        if attempt.num_spans < expected:
            await self._ends.wait(key, attempt.num_spans, expected, self._span_seconds)
        return self.machine.state.attempt(*key).num_spans

    async def update_worker(
        self, worker_id: str, stats: Any, attempts: Sequence[AttemptKey]
    ) -> Worker:
        return await self._do(
            self.machine.update_worker, worker_id, heartbeat_stats=stats, attempts=attempts
        )

    async def worker_lost(self, worker_id: str, why: str) -> list[Attempt]:
        self._takers.drop_worker(worker_id)
        return await self._do(self.machine.worker_lost, worker_id, why)

    async def put_state(self, key: str, value: bytes) -> None:
        await self._do(self.machine.put_value, key, value)

    # Spans.

    async def add_spans(self, items: Sequence[SpanItem]) -> list[BatchEntry | AglError]:
        """Number and journal many batches in one commit; per batch where it was put, or what was wrong with it."""
        self._check()
        results: list[BatchEntry | AglError] = []
        rows: list[SpanRow] = []
        late: list[int] = []
        for place, item in enumerate(items):
            key = item[:2]
            try:
                closed = self.machine.state.attempt(*key).status.final
                known = self.machine.known_batch(key, item[2])
                if closed:
                    late.append(place)
                results.append(BatchEntry(0, 0) if closed else known or self._number(item, rows))
            except AglError as error:
                results.append(error)
        await self._committed(None, rows)
        for place in late:
            results[place] = await self._add_late(items[place])
        return results

    def _number(self, item: SpanItem, rows: list[SpanRow]) -> BatchEntry:
        rollout_id, attempt_id, batch_id, count, payload = item
        if count < 1:
            raise InputError(f"add_spans: expected one span or more in the batch, got {count}")
        key = (rollout_id, attempt_id)
        num_before = self.machine.state.attempt(*key).num_spans
        entry = self._run(self.machine.add_spans, key, batch_id, count, len(payload))
        row = SpanRow(batch_id, key, entry.first, count, payload)
        rows.append(row)
        self._cache.append(row, num_before)
        self._ends.arrived(key, count)
        return entry

    async def _add_late(self, item: SpanItem) -> BatchEntry:
        """Spans of an attempt that has ended: kept, and a repetition is looked up in the journal, one at a time."""
        async with self._late:
            await self._committed(None)
            found = await self._journal.find_batch(item[:2], item[2])
            self._check()
            if found is not None:
                return found
            rows: list[SpanRow] = []
            entry = self._number(item, rows)
            return await self._committed(entry, rows)

    async def read_spans(self, keys: Sequence[AttemptKey]) -> Payloads:
        """The payloads of these attempts, in the given order; from memory where they are all there."""
        self._check()
        wanted = {key: self.machine.state.attempt(*key) for key in keys}
        found = {key: self._cache.get(key) for key in wanted}
        missing = [key for key, rows in found.items() if rows is None and wanted[key].num_spans]
        await self._committed(None)
        if missing:
            found |= await self._read_back(missing)
        return join([row for key in keys for row in found[key] or ()])

    async def _read_back(self, keys: Sequence[AttemptKey]) -> dict[AttemptKey, list[SpanRow]]:
        """From the journal into the cache."""
        found: dict[AttemptKey, list[SpanRow]] = {key: [] for key in keys}
        for row in await self._journal.payloads(keys):
            found[row.key].append(row)
        for key, rows in found.items():
            if sum(row.number for row in rows) == self.machine.state.attempt(*key).num_spans:
                self._cache.fill(key, rows)
        return found
