"""The LightningStore in one process: state machine, journal, conditions and clock, on one event loop.

What it is: every command goes through the machine at once and is answered when the journal holds it; reads wait for what they
may have seen. A commit that fails ends the core: all callers get its StoreError, and the owner opens a new core from
the journal, so memory and journal never part. Span payloads pass beside the machine as bytes and are never opened here.
Who calls it: `actors.store.Store` (over Ray), `agl_ray.store.client.LightningStore.local` (in-process). Public coroutines are the
wire interface; `LightningStore` documents them. Test alone: tests/unit/test_store_core.py.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from agl_ray.store.cache import PayloadCache
from agl_ray.store.journal import GroupCommit, Journal, Row, SpanRow, open_journal, row_of
from agl_ray.store.machine import Machine
from agl_ray.store.payload import Payloads, join
from agl_ray.store.reads import Reads
from agl_ray.store.state import AttemptKey, BatchEntry, Change, Snapshot
from agl_ray.store.waiting import FinalWaiters, QueueWaiters, SpanWaiters
from agl_ray.types import (
    AglError,
    Attempt,
    AttemptedRollout,
    Conflict,
    EndReason,
    EnqueueRolloutRequest,
    InputError,
    NamedResources,
    ResourcesUpdate,
    Rollout,
    StoreError,
    Worker,
)

log = logging.getLogger("agl_ray.store")
T = TypeVar("T")
SpanItem = tuple[str, str, str, int, bytes]
"""(rollout_id, attempt_id, batch_id, number of spans, payload)"""

TICK_SECONDS = 0.5  # how often leases and deadlines are looked at
DEAF_SECONDS = (
    3.0  # a tick later than this: the store itself stood still, so no lease may run out for it
)


class StoreCore(Reads):
    """Make it with `await StoreCore.open(url, ...)`; end it with `await close()`.

    span_seconds: how long an `ok` end waits for spans that its runner counted and the store has not seen.
    """

    def __init__(
        self,
        url: str,
        journal: Journal,
        snapshot: Snapshot,
        *,
        lease_seconds: float,
        cache_mib: float,
        span_seconds: float,
    ) -> None:
        self.url = url
        self.loop = asyncio.get_running_loop()
        self.machine = Machine(lease_seconds=lease_seconds)
        self._offset = (
            time.time() - time.monotonic()
        )  # leases must not feel the wall clock being set
        self._opened_at = self.now()
        self.machine.restore(snapshot, self.now())
        self._starts = snapshot.starts
        self._journal = journal
        self._group = GroupCommit(journal, self.loop, self._fail)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="store-reader")
        self._cache = PayloadCache(int(cache_mib * 2**20))
        self._span_seconds = span_seconds
        self._takers, self._finals, self._ends = QueueWaiters(), FinalWaiters(), SpanWaiters()
        self._late = asyncio.Lock()
        self.failure: StoreError | None = None
        self._clock = self.loop.create_task(self._watch_clock(), name="store-clock")

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        lease_seconds: float = 30.0,
        cache_mib: float = 256.0,
        span_seconds: float = 5.0,
        must_exist: bool = False,
    ) -> StoreCore:
        """Open the journal at `url` and restore what it holds. StoreError says what is wrong with it."""
        journal = open_journal(url, must_exist=must_exist)
        try:
            snapshot = await asyncio.to_thread(journal.load)
            return cls(
                url,
                journal,
                snapshot,
                lease_seconds=lease_seconds,
                cache_mib=cache_mib,
                span_seconds=span_seconds,
            )
        except Conflict as error:
            journal.close()
            raise StoreError(f"store journal {url}: damaged: {error}") from error
        except BaseException:
            journal.close()
            raise

    async def close(self) -> None:
        """Flush, end the clock and the threads. Later calls fail."""
        self._clock.cancel()
        if self.failure is None:
            self._fail(StoreError(f"store {self.url}: it was shut down"))
        await self._group.close()
        self._reader.shutdown(wait=True)
        await asyncio.to_thread(self._journal.close)

    def now(self) -> float:
        return self._offset + time.monotonic()

    # Commits.

    async def _committed(self, result: T, spans: Sequence[SpanRow] = ()) -> T:
        """`result`, once the journal holds every change made so far (one's own and those one may have seen)."""
        pending = self._submit(spans)
        if pending is not None:
            await asyncio.wait([pending])
            if pending.exception() is not None:
                raise self._failure()
        return result

    def _submit(self, spans: Sequence[SpanRow] = ()) -> asyncio.Future[None] | None:
        changes = self.machine.state.drain()
        if not changes and not spans:
            return self._group.pending()
        try:
            rows = [row_of(kind, key, change) for (kind, key), change in changes.items()]
        except (TypeError, ValueError) as error:
            self._fail(StoreError(f"store {self.url}: a record cannot be written: {error}"))
            raise self._failure() from error
        future = self._group.submit(rows, spans)
        self._announce(changes, rows)
        return future

    def _announce(self, changes: dict[tuple[str, str], Change], rows: Sequence[Row]) -> None:
        waiting = 0
        for row in rows:
            if row.kind == "rollout":
                status = changes["rollout", row.key].record.status
                waiting += status.waiting
                if status.final:
                    self._finals.final(row.key)
        self._takers.wake(waiting)

    def _check(self) -> None:
        if self.failure is not None:
            raise self._failure()

    def _failure(self) -> StoreError:
        """A fresh exception per caller: a shared one would gather everybody's tracebacks."""
        return StoreError(str(self.failure))

    def _fail(self, error: StoreError) -> None:
        """The end of this core: whoever waits is told, and everybody after."""
        if self.failure is None:
            self.failure = error
            for waiters in (self._takers, self._finals, self._ends):
                waiters.fail(error)

    async def _watch_clock(self) -> None:
        """End attempts whose lease or deadline has passed, whether or not anybody calls."""
        last = self.now()
        while self.failure is None:
            await asyncio.sleep(TICK_SECONDS)
            now = self.now()
            if now - last > TICK_SECONDS + DEAF_SECONDS:
                log.warning("the store stood still for %.1f s: all leases are renewed", now - last)
                self.machine.renew_all(now)
            last = now
            try:
                for attempt in self.machine.tick(now):
                    log.warning(
                        "attempt %s/%s: %s", attempt.rollout_id, attempt.attempt_id, attempt.error
                    )
                self._submit()
            except StoreError as error:
                self._fail(error)

    # Commands.

    async def add_resources(self, resources_id: str, resources: NamedResources) -> ResourcesUpdate:
        self._check()
        return await self._committed(
            self.machine.add_resources(resources_id, resources, self.now())
        )

    async def update_resources(
        self, resources_id: str, resources: NamedResources, repeated: bool = False
    ) -> ResourcesUpdate:
        self._check()
        return await self._committed(
            self.machine.update_resources(resources_id, resources, self.now(), repeated=repeated)
        )

    async def enqueue(self, requests: Sequence[EnqueueRolloutRequest]) -> list[Rollout]:
        self._check()
        return await self._committed(self.machine.enqueue(requests, self.now()))

    async def dequeue(
        self, limit: int, worker_id: str | None, wait_seconds: float, request_id: str | None
    ) -> list[AttemptedRollout]:
        """Waits at most `wait_seconds` for the first rollout; then takes what is there, at most `limit`."""
        give_up = self.loop.time() + wait_seconds
        while True:
            self._check()
            taken = self.machine.dequeue(
                limit=limit, worker_id=worker_id, request_id=request_id, now=self.now()
            )
            left = give_up - self.loop.time()
            if taken or left <= 0 or limit <= 0:
                return await self._committed(taken)
            self._submit()
            if not await self._takers.wait(worker_id, left):
                return []  # the worker was declared dead meanwhile

    async def start_rollout(
        self, request: EnqueueRolloutRequest, worker_id: str | None, request_id: str
    ) -> AttemptedRollout:
        self._check()
        return await self._committed(
            self.machine.start_rollout(request, worker_id, request_id, self.now())
        )

    async def start_attempt(
        self, rollout_id: str, worker_id: str | None, request_id: str
    ) -> AttemptedRollout:
        self._check()
        return await self._committed(
            self.machine.start_attempt(rollout_id, worker_id, request_id, self.now())
        )

    async def cancel_rollouts(self, rollout_ids: Sequence[str]) -> list[Rollout]:
        self._check()
        return await self._committed(self.machine.cancel_rollouts(rollout_ids, self.now()))

    async def update_rollout(self, rollout_id: str, fields: dict[str, Any]) -> Rollout:
        self._check()
        return await self._committed(self.machine.update_rollout(rollout_id, self.now(), **fields))

    async def update_attempt(
        self, rollout_id: str, attempt_id: str, fields: dict[str, Any]
    ) -> Attempt:
        self._check()
        return await self._committed(
            self.machine.update_attempt(rollout_id, attempt_id, self.now(), **fields)
        )

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
            key = (rollout_id, attempt.attempt_id)
            if attempt.num_spans < expected_spans:
                await self._ends.wait(key, attempt.num_spans, expected_spans, self._span_seconds)
            num_spans = self.machine.state.attempt(*key).num_spans
            if num_spans < expected_spans:
                reason = EndReason.LOST
                error = (
                    f"only {num_spans} of the attempt's {expected_spans} spans reached the store"
                )
        self._check()
        return await self._committed(
            self.machine.end_attempt(
                rollout_id, attempt_id, reason, now=self.now(), reward=reward, error=error
            )
        )

    async def update_worker(
        self, worker_id: str, stats: Any, attempts: Sequence[AttemptKey]
    ) -> Worker:
        self._check()
        return await self._committed(
            self.machine.update_worker(
                worker_id, self.now(), heartbeat_stats=stats, attempts=attempts
            )
        )

    async def worker_lost(self, worker_id: str, why: str) -> list[Attempt]:
        self._check()
        self._takers.drop_worker(worker_id)
        return await self._committed(self.machine.worker_lost(worker_id, why, self.now()))

    async def put_state(self, key: str, value: bytes) -> None:
        self._check()
        self.machine.state.put_value(key, value)
        await self._committed(None)

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
        entry = self.machine.add_spans(key, batch_id, count, len(payload), self.now())
        row = SpanRow(batch_id, key, entry.first, count, payload)
        rows.append(row)
        self._cache.append(row, num_before)
        self._ends.arrived(key, count)
        return entry

    async def _add_late(self, item: SpanItem) -> BatchEntry:
        """Spans of an attempt that has ended: kept, and a repetition is looked up in the journal, one at a time."""
        async with self._late:
            await self._committed(None)
            find = functools.partial(self._journal.find_batch, item[:2], item[2])
            found = await self.loop.run_in_executor(self._reader, find)
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
        found = {key: self._cache.get(key) for key in keys}
        missing = [key for key, rows in found.items() if rows is None and wanted[key].num_spans]
        await self._committed(None)
        if missing:
            read = await self.loop.run_in_executor(self._reader, self._journal.payloads, missing)
            for key in missing:
                found[key] = rows = [row for row in read if row.key == key]
                if sum(row.count for row in rows) == self.machine.state.attempt(*key).num_spans:
                    self._cache.fill(key, rows)
        return join(
            [(row.first, row.count, row.payload) for key in keys for row in found[key] or ()]
        )
