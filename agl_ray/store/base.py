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
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self, TypeVar

from agl_ray.config.store_address import masked
from agl_ray.store.cache import PayloadCache
from agl_ray.store.events import EventLog
from agl_ray.store.journals.base import Journal, Live, Row, SpanRow
from agl_ray.store.journals.group_commit import GroupCommit
from agl_ray.store.journals.marks import open_checked
from agl_ray.store.journals.opening import open_journal
from agl_ray.store.journals.settings import JournalSettings
from agl_ray.store.loading import Loader, group_of
from agl_ray.store.machine import Machine
from agl_ray.store.residents import Key
from agl_ray.store.rows import record_of, row_of
from agl_ray.store.state import Change
from agl_ray.store.waiting import Backlog, FinalWaiters, QueueWaiters, SpanWaiters
from agl_ray.types import AglError, ResourcesUpdate, StoreError, Worker

log = logging.getLogger("agl_ray.store")
T = TypeVar("T")

TICK_SECONDS = 0.5  # how often leases and deadlines are looked at
DEAF_SECONDS = (
    3.0  # a tick later than this: the store itself stood still, so no lease may run out for it
)


class CoreBase:
    """Make it with `await open(url, ...)`; end it with `await close()`.

    memory_mib: how much of the records that are final or wait stays in memory; the others are read back when they are named.
    cache_mib: how much of the newest span payloads does.
    span_seconds: how long an `ok` end waits for spans that its runner counted and the store has not seen.
    """

    def __init__(
        self,
        url: str,
        journal: Journal,
        *,
        lease_seconds: float,
        memory_mib: float,
        cache_mib: float,
        span_seconds: float,
    ) -> None:
        self.url = masked(url)  # for people: it is shown in errors and statistics
        self.loop = asyncio.get_running_loop()
        self.machine = Machine(lease_seconds=lease_seconds, max_bytes=int(memory_mib * 2**20))
        self._offset = (
            time.time() - time.monotonic()
        )  # leases must not feel the wall clock being set
        self._opened_at = self.now()
        self._starts = 0
        self._journal = journal
        self._group = GroupCommit(journal, self.loop, self._fail)
        self._travelling: asyncio.Future[None] | None = None  # the newest commit seen by `_send`
        self._events = EventLog(journal, self._fail)
        self._loader = Loader(journal, self.machine.state, self._settled)
        self._present = self._loader.present
        self._cache = PayloadCache(int(cache_mib * 2**20))
        self._span_seconds = span_seconds
        self._takers, self._finals, self._ends = QueueWaiters(), FinalWaiters(), SpanWaiters()
        self._backlog = Backlog()
        self._late = asyncio.Lock()
        self.failure: StoreError | None = None
        self._clock: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        lease_seconds: float = 30.0,
        memory_mib: float = 256.0,
        cache_mib: float = 256.0,
        span_seconds: float = 5.0,
        must_exist: bool = False,
        settings: JournalSettings | None = None,
    ) -> Self:
        """Open the journal at `url` and take up what is open in it. StoreError says what is wrong with it."""
        core = cls(
            url,
            open_journal(url, settings),
            lease_seconds=lease_seconds,
            memory_mib=memory_mib,
            cache_mib=cache_mib,
            span_seconds=span_seconds,
        )
        await core._start(must_exist)
        return core

    async def _start(self, must_exist: bool) -> None:
        live = await open_checked(self._journal, must_exist=must_exist)
        try:
            await self._restore(live)
        except BaseException:
            await self._journal.close()
            raise
        self._clock = self.loop.create_task(self._watch_clock(), name="store-clock")
        self._clock.add_done_callback(self._clock_ended)

    async def _restore(self, live: Live) -> None:
        """Only what is open comes to memory: the history stays where it is."""
        ids = list(dict.fromkeys(row.columns[0] for row in live.open_attempts))
        rows, attempts, spans = await self._loader.read_rollouts(ids)
        for missing in sorted({*ids} - {row.key for row in rows}):
            raise StoreError(
                f"store {self.url}: damaged: the journal has an open attempt of rollout {missing!r} and not the rollout; "
                "restore the journal from a copy, or start a new run"
            )
        await self._events.restore(live.last_event)
        latest = live.latest_resources
        self._starts = live.starts
        self.machine.restore(
            live,
            [group_of(row, attempts.get(row.key, []), spans.get(row.key, [])) for row in rows],
            [record_of(row, Worker) for row in live.workers],
            None if latest is None else record_of(latest, ResourcesUpdate),
            self.now(),
        )
        self._backlog.note(len(self.machine.state.queue))

    async def close(self) -> None:
        """Flush, end the clock, close the journal. Later calls fail."""
        if self._clock is not None:
            self._clock.cancel()
        if self.failure is None:
            self._fail(StoreError(f"store {self.url}: it was shut down"))
        await self._group.close()
        await self._events.close()
        await self._journal.close()

    def now(self) -> float:
        return self._offset + time.monotonic()

    # Commits.

    async def _do(
        self, command: Callable[..., T], *arguments: Any, needs: Sequence[Key] = (), **named: Any
    ) -> T:
        """Run a command of the machine and give its result when it is in the journal. `needs`: what it names."""
        if all(map(self.machine.state.has, needs)):
            self.machine.state.residents.used(needs)
            return await self._committed(self._run(command, *arguments, **named))
        async with self._present(needs):
            result = self._run(command, *arguments, **named)
        return await self._committed(result)

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
            try:
                await asyncio.shield(pending)
            except StoreError:
                raise self._failure() from None
        return result

    async def _settled(self) -> None:
        await self._committed(None)

    def _submit(self, spans: Sequence[SpanRow] = ()) -> asyncio.Future[None] | None:
        state = self.machine.state
        changes = state.drain()
        if not changes and not spans:
            state.residents.sent(None)  # heartbeats alone: nothing has to reach the journal
            state.residents.arrived(None)
            return self._group.pending()
        try:
            rows = [row_of(kind, key, *change) for (kind, key), change in changes.items()]
        except (TypeError, ValueError) as error:
            self._fail(StoreError(f"store {self.url}: a record cannot be written: {error}"))
            raise self._failure() from error
        for row, change in zip(rows, changes.values(), strict=True):
            state.weigh(row.kind, row.key, change.record, len(row.body))
        changed = {key: change.record for key, change in changes.items()}
        events, event_rows = self._events.note(changed, self.now())
        future = self._send(self._group.submit(rows, spans, event_rows))
        self._events.sent(future, events)
        self._announce(changes, rows)
        return future

    def _send(self, commit: asyncio.Future[None]) -> asyncio.Future[None]:
        """All that changed so far travels with `commit`, and may leave memory once it has arrived."""
        self.machine.state.residents.sent(commit)
        if commit is not self._travelling:
            self._travelling = commit
            commit.add_done_callback(self._arrived)
        return commit

    def _arrived(self, commit: asyncio.Future[None]) -> None:
        if commit.exception() is None:
            self.machine.state.residents.arrived(commit)
            self.machine.state.shrink()
            self._events.arrived(commit)

    def _announce(self, changes: dict[tuple[str, str], Change], rows: Sequence[Row]) -> None:
        waiting = 0
        for row in rows:
            if row.kind == "rollout":
                status = changes["rollout", row.key].record.status
                waiting += status.waiting
                if status.final:
                    self._finals.final(row.key)
        self._takers.wake(waiting)
        self._backlog.note(len(self.machine.state.queue))

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
            for waiters in (self._takers, self._finals, self._ends, self._events, self._backlog):
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


def rollouts(rollout_ids: Iterable[str]) -> list[Key]:
    """The keys of these rollouts."""
    return [("rollout", one) for one in rollout_ids]
