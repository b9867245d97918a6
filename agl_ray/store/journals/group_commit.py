"""The group commit in front of a journal: many callers, one transaction.

What it is: while a transaction is on its way, new writes gather and become the next one; all callers of a transaction are
acknowledged at once.
Who calls it: `agl_ray.store.base`. Test alone: tests/unit/test_store_journal.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from agl_ray.store.journals.base import EventRow, Journal, Row, SpanRow
from agl_ray.types import StoreError


class GroupCommit:
    """`submit` is called on the event loop and returns the future of its group: done when the transaction is, or failed
    with its StoreError. Groups are written in order. After a failure every later write fails the same way: the state in
    memory is ahead of the journal and must be loaded afresh.
    """

    def __init__(
        self,
        journal: Journal,
        loop: asyncio.AbstractEventLoop,
        on_failure: Callable[[StoreError], None],
    ) -> None:
        self._journal = journal
        self._loop = loop
        self._on_failure = on_failure
        self._rows: dict[tuple[str, str], Row] = {}
        self._spans: list[SpanRow] = []
        self._events: list[EventRow] = []
        self._forgotten: list[str] = []
        self._group: asyncio.Future[None] | None = None  # gathering
        self._writing: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None  # of `_writing`
        self.failure: StoreError | None = None
        self.groups = 0

    def submit(
        self, rows: Sequence[Row], spans: Sequence[SpanRow], events: Sequence[EventRow] = ()
    ) -> asyncio.Future[None]:
        """Add to the gathering group; a newer row replaces an older one of the same record."""
        if self.failure is not None:
            raise self.failure
        self._rows.update(((row.kind, row.key), row) for row in rows)
        self._spans.extend(spans)
        self._events.extend(events)
        return self._gathering()

    def forget(self, rollout_ids: Sequence[str]) -> asyncio.Future[None]:
        """Remove these rollouts, after everything submitted so far. They may be submitted again once that is done."""
        if self.failure is not None:
            raise self.failure
        self._forgotten.extend(rollout_ids)
        return self._gathering()

    def _gathering(self) -> asyncio.Future[None]:
        if self._group is None:
            self._group = self._loop.create_future()
            if self._writing is None:
                self._loop.call_soon(self._write)
        return self._group

    def pending(self) -> asyncio.Future[None] | None:
        """The future of the newest group not yet written; None where everything is in the journal."""
        if self.failure is not None:
            raise self.failure
        return self._group or self._writing

    def _write(self) -> None:
        if self._group is None:
            return
        self._writing, self._group = self._group, None
        rows, self._rows = list(self._rows.values()), {}
        spans, self._spans = self._spans, []
        events, self._events = self._events, []
        forgotten, self._forgotten = self._forgotten, []
        work = self._commit(rows, spans, events, forgotten)
        self._task = self._loop.create_task(work, name="store-commit")
        self._task.add_done_callback(self._written)

    async def _commit(
        self,
        rows: Sequence[Row],
        spans: Sequence[SpanRow],
        events: Sequence[EventRow],
        forgotten: Sequence[str],
    ) -> None:
        if rows or spans or events:
            await self._journal.write(rows, spans, events)
        if forgotten:
            await self._journal.forget(forgotten)

    def _written(self, done: asyncio.Task[None]) -> None:
        group, self._writing = self._writing, None
        if group is None:
            return
        self.groups += 1
        if done.cancelled():
            error: BaseException | None = StoreError("the store's event loop ended during a write")
        else:
            error = done.exception()
        if error is None:
            group.set_result(None)
            self._write()
            return
        self.failure = _as_store_error(error)
        for future in filter(None, (group, self._group)):
            future.set_exception(self.failure)
            future.exception()  # seen: nobody may be waiting for it
        self._group = None
        self._on_failure(self.failure)

    async def close(self) -> None:
        """Wait for what was submitted."""
        while self.failure is None and (pending := self.pending()) is not None:
            await asyncio.wait([pending])


def _as_store_error(error: BaseException) -> StoreError:
    if isinstance(error, StoreError):
        return error
    return StoreError(f"the store's journal failed unexpectedly: {type(error).__name__}: {error}")
