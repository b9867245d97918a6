"""Where the store's truth rests: what a journal must do, and the group commit in front of it.

What it is: `Journal`, the protocol of a journal (one blocking transaction per `write`), `open_journal`, which chooses one by URL,
and `GroupCommit`, which runs the writes in one thread and acknowledges all callers of a transaction at once.
Who calls it: `agl_ray.store.core`. Test alone: tests/unit/test_store_journal.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import msgspec

from agl_ray.store.state import AttemptKey, BatchEntry, Change, Snapshot
from agl_ray.types import ConfigError, StoreError


class Row(NamedTuple):
    """A record as the journal keeps it. `key` identifies it within its kind, `body` is JSON (bytes as they are for `state`)."""

    kind: str  # rollout | attempt | resources | worker | state
    key: str
    position: int
    body: bytes


class SpanRow(NamedTuple):
    """A batch of spans as the journal keeps it (see `agl_ray.store.payload` for `payload`)."""

    batch_id: str  # unique within its attempt
    key: AttemptKey
    first: int
    number: int  # of spans
    payload: bytes


class Journal(Protocol):
    """Blocking; `write` and the reads may be called from two threads. Every failure is a StoreError."""

    durable: bool

    def load(self) -> Snapshot:
        """Open and read everything but the payloads."""

    def write(self, rows: Sequence[Row], spans: Sequence[SpanRow]) -> None:
        """One transaction; on return it survives the machine."""

    def payloads(self, keys: Sequence[AttemptKey]) -> list[SpanRow]:
        """The spans of these attempts, per attempt in order of sequence."""

    def find_batch(self, key: AttemptKey, batch_id: str) -> BatchEntry | None:
        """Where a batch of this attempt was put, if it is there."""

    def close(self) -> None: ...


def open_journal(url: str, *, must_exist: bool = False) -> Journal:
    """The journal for `sqlite:///path` (three slashes: relative, four: absolute) or `memory://`; nothing is opened yet.

    must_exist: a store that restarts expects its file (and `memory://` warns that all is gone)."""
    from agl_ray.store.memory import MemoryJournal
    from agl_ray.store.sqlite import SqliteJournal

    if url == "memory://":
        return MemoryJournal()
    scheme, _, path = url.partition(":///")
    if scheme == "sqlite" and path:
        return SqliteJournal(path, must_exist=must_exist)
    raise ConfigError(f"store.url: expected sqlite:///path or memory://, got {url!r}")


def row_of(kind: str, key: str, change: Change) -> Row:
    body = change.record if kind == "state" else msgspec.json.encode(change.record)
    return Row(kind, key, change.position, body)


class GroupCommit:
    """One writer thread; while it works, new writes gather and become the next transaction.

    `submit` is called on the event loop and returns the future of its group: done when the transaction is, or failed
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
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store-writer")
        self._rows: dict[tuple[str, str], Row] = {}
        self._spans: list[SpanRow] = []
        self._group: asyncio.Future[None] | None = None  # gathering
        self._writing: asyncio.Future[None] | None = None
        self.failure: StoreError | None = None
        self.groups = 0

    def submit(self, rows: Sequence[Row], spans: Sequence[SpanRow]) -> asyncio.Future[None]:
        """Add to the gathering group; a newer row replaces an older one of the same record."""
        if self.failure is not None:
            raise self.failure
        self._rows.update(((row.kind, row.key), row) for row in rows)
        self._spans.extend(spans)
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
        done = self._loop.run_in_executor(self._thread, self._journal.write, rows, spans)
        done.add_done_callback(self._written)

    def _written(self, done: asyncio.Future[None]) -> None:
        group, self._writing = self._writing, None
        error = done.exception()
        if group is None:
            return
        self.groups += 1
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
        """Wait for what was submitted, then end the thread."""
        while self.failure is None and (pending := self.pending()) is not None:
            await asyncio.wait([pending])
        self._thread.shutdown(wait=True)


def _as_store_error(error: BaseException) -> StoreError:
    if isinstance(error, StoreError):
        return error
    return StoreError(f"the store's journal failed unexpectedly: {type(error).__name__}: {error}")
