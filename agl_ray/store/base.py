"""The running part of a store: state machine, journal, group commit and clock on one event loop.

What it is: `_do` runs a command of the machine at once and answers when the journal holds it; `_committed` makes a read wait for
what it may have seen. A commit that fails ends the core: all callers get its StoreError, and the owner opens a new core from
the journal, so memory and journal never part.
Who calls it: `agl_ray.store.reads` and `agl_ray.store.core` build on it. Test alone: tests/unit/test_store_core.py.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

from agl_ray.store.cache import PayloadCache
from agl_ray.store.journals.base import Journal, Query, Row, SpanRow
from agl_ray.store.journals.group_commit import GroupCommit
from agl_ray.store.journals.opening import open_journal
from agl_ray.store.journals.settings import JournalSettings
from agl_ray.store.machine import Machine
from agl_ray.store.rows import TYPES, record_of, row_of
from agl_ray.store.state import Change, Snapshot
from agl_ray.store.waiting import FinalWaiters, QueueWaiters, SpanWaiters
from agl_ray.types import AglError, Conflict, StoreError

log = logging.getLogger("agl_ray.store")
T = TypeVar("T")

TICK_SECONDS = 0.5  # how often leases and deadlines are looked at
DEAF_SECONDS = (
    3.0  # a tick later than this: the store itself stood still, so no lease may run out for it
)


class CoreBase:
    """Make it with `await open(url, ...)`; end it with `await close()`.

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
        self._cache = PayloadCache(int(cache_mib * 2**20))
        self._span_seconds = span_seconds
        self._takers, self._finals, self._ends = QueueWaiters(), FinalWaiters(), SpanWaiters()
        self._late = asyncio.Lock()
        self.failure: StoreError | None = None
        self._clock = self.loop.create_task(self._watch_clock(), name="store-clock")
        self._clock.add_done_callback(self._clock_ended)

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        lease_seconds: float = 30.0,
        cache_mib: float = 256.0,
        span_seconds: float = 5.0,
        must_exist: bool = False,
        settings: JournalSettings | None = None,
    ) -> Self:
        """Open the journal at `url` and restore what it holds. StoreError says what is wrong with it."""
        journal = open_journal(url, settings)
        try:
            snapshot = await _snapshot(journal, must_exist)
            return cls(
                url,
                journal,
                snapshot,
                lease_seconds=lease_seconds,
                cache_mib=cache_mib,
                span_seconds=span_seconds,
            )
        except Conflict as error:
            await journal.close()
            raise StoreError(f"store journal {url}: damaged: {error}") from error
        except BaseException:
            await journal.close()
            raise

    async def close(self) -> None:
        """Flush, end the clock and the threads. Later calls fail."""
        self._clock.cancel()
        if self.failure is None:
            self._fail(StoreError(f"store {self.url}: it was shut down"))
        await self._group.close()
        await self._journal.close()

    def now(self) -> float:
        return self._offset + time.monotonic()

    # Commits.

    async def _do(self, command: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Run a command of the machine now and give its result when it is in the journal."""
        return await self._committed(self._run(command, *arguments, **named))

    def _run(self, command: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """`command(..., now=...)`. A bug that stops it half-way ends the core: the journal has the whole truth."""
        self._check()
        try:
            return command(*arguments, now=self.now(), **named)
        except AglError:
            raise
        except Exception as error:
            if self.machine.state.changes:
                self._fail(StoreError(f"store {self.url}: a command stopped half-way: {error!r}"))
            raise

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
            rows = [row_of(kind, key, *change) for (kind, key), change in changes.items()]
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
            for ended in self.machine.tick(now):
                log.warning("attempt %s/%s: %s", ended.rollout_id, ended.attempt_id, ended.error)
            self._submit()

    def _clock_ended(self, clock: asyncio.Task[None]) -> None:
        if not clock.cancelled() and (error := clock.exception()) is not None:
            self._fail(StoreError(f"store {self.url}: its clock stopped: {error!r}"))


async def _snapshot(journal: Journal, must_exist: bool) -> Snapshot:
    live = await journal.open(must_exist=must_exist)

    async def every(kind: str, order: str = "position") -> list[Row]:
        return (await journal.query(Query(kind, order_by=order))).rows

    rollouts = await every("rollout", "created")
    spans = await journal.span_totals([row.key for row in rollouts])
    return Snapshot(
        rollouts=[
            (row.columns[0], row.position, record_of(row, TYPES["rollout"])) for row in rollouts
        ],
        attempts=[record_of(row, TYPES["attempt"]) for row in await every("attempt")],
        resources=[
            (row.position, record_of(row, TYPES["resources"])) for row in await every("resources")
        ],
        workers=[record_of(row, TYPES["worker"]) for row in live.workers],
        values={row.key: row.body for row in await every("state")},
        spans=spans,
        batches=live.open_batches,
        starts=live.starts,
    )
