"""Records that left memory, brought back when a command names them.

What it is: `present(keys)`, inside of which the named records are in memory if the store has them at all, and stay there. Calls
that come while a read is on its way gather and share the next one, so a crowd costs one question to the journal.
A record that is not in memory is not being changed either, so what the journal says of it is the truth.
Who calls it: `agl_ray.store.base`, `agl_ray.store.core`, `agl_ray.store.reads`. Test alone: tests/unit/test_store_bounded.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence

from agl_ray.store.checks import is_id
from agl_ray.store.journals.base import Journal, Row, SpanTotals
from agl_ray.store.residents import Key
from agl_ray.store.rows import record_of
from agl_ray.store.state import Group, State
from agl_ray.types import Attempt, ResourcesUpdate, Rollout, StoreError

Damages = dict[Key, StoreError]


class Loader:
    """settled: waits until the journal holds (and has forgotten) everything up to now."""

    def __init__(
        self, journal: Journal, state: State, settled: Callable[[], Awaitable[None]]
    ) -> None:
        self._journal = journal
        self._state = state
        self._settled = settled
        self._wanted: dict[Key, None] = {}
        self._next: asyncio.Task[Damages] | None = None  # gathering
        self._reading: asyncio.Task[Damages] | None = None
        self.forgetting: set[str] = set()  # rollouts gone from memory, not yet from the journal

    def present(self, keys: Iterable[Key]) -> Present:
        """Inside (`async with`), those of `keys` that the store has are in memory. StoreError where one cannot be read."""
        return Present(self, list(keys))

    async def bring(self, keys: Sequence[Key]) -> None:
        """Pin `keys` and load those that are not in memory; afterwards, `release` them."""
        self._state.residents.pin(keys)
        missing = [key for key in keys if not self._state.has(key)]
        if missing:
            try:
                await self._load(missing)
            except BaseException:
                self.release(keys)
                raise

    def release(self, keys: Sequence[Key]) -> None:
        self._state.residents.unpin(keys)
        self._state.shrink()

    async def _load(self, keys: Sequence[Key]) -> None:
        """`keys` are pinned."""
        possible = [key for key in keys if key[0] == "state" or is_id(key[1])]
        if not possible:
            return
        self._wanted.update(dict.fromkeys(possible))
        if self._next is None:
            work = self._read_after(self._reading)
            self._next = asyncio.get_running_loop().create_task(work, name="store-loader")
        task = self._next
        try:
            damages = await asyncio.shield(task)
        except StoreError as error:  # a fresh one per caller: a shared one gathers all tracebacks
            raise StoreError(str(error)) from error
        for key in possible if damages else ():
            if key in damages:
                raise StoreError(str(damages[key]))

    async def _read_after(self, before: asyncio.Task[Damages] | None) -> Damages:
        """One read at a time: what is wanted meanwhile gathers."""
        if before is not None:
            await asyncio.wait([before])
        self._reading, self._next = self._next, None
        wanted, self._wanted = self._wanted, {}
        return await self._read([key for key in wanted if not self._state.has(key)])

    async def _read(self, keys: Sequence[Key]) -> Damages:
        if any(key[0] == "rollout" and key[1] in self.forgetting for key in keys):
            await self._settled()
        damages: Damages = {}
        rollout_ids = [key[1] for key in keys if key[0] == "rollout"]
        if rollout_ids:
            rows, attempts, spans = await self.read_rollouts(rollout_ids)
            for row in rows:
                self._admit(row, attempts.get(row.key, []), spans.get(row.key, []), damages)
        for kind in ("resources", "state"):
            ids = [key[1] for key in keys if key[0] == kind]
            for row in await self._journal.rows(kind, ids) if ids else ():
                self._admit(row, [], [], damages)
        return damages

    async def read_rollouts(
        self, rollout_ids: Sequence[str]
    ) -> tuple[list[Row], dict[str, list[Row]], dict[str, list[SpanTotals]]]:
        """Rows of rollouts, and by rollout those of their attempts and the sums of their spans."""
        rows = await self._journal.rows("rollout", rollout_ids)
        attempts: dict[str, list[Row]] = {}
        spans: dict[str, list[SpanTotals]] = {}
        if known := [row.key for row in rows]:
            for row in await self._journal.attempts_of(known):
                attempts.setdefault(row.columns[0], []).append(row)
            for one in await self._journal.span_totals(known):
                spans.setdefault(one.key[0], []).append(one)
        return rows, attempts, spans

    def _admit(
        self, row: Row, attempts: Sequence[Row], spans: Sequence[SpanTotals], damages: Damages
    ) -> None:
        key = (row.kind, row.key)
        if self._state.has(key):
            return  # made meanwhile by somebody who knew that it was not there
        try:
            if row.kind == "rollout":
                self._state.admit(group_of(row, attempts, spans))
            elif row.kind == "resources":
                self._state.admit_resources(record_of(row, ResourcesUpdate), len(row.body))
            else:
                self._state.admit_value(row.key, row.body)
        except StoreError as error:
            damages[key] = error
        else:
            self._state.residents.settle(key)  # whoever wanted it may have gone


class Present:
    """What `Loader.present` gives (a class, as every batch of spans passes through it)."""

    __slots__ = ("_keys", "_loader")

    def __init__(self, loader: Loader, keys: list[Key]) -> None:
        self._loader, self._keys = loader, keys

    async def __aenter__(self) -> None:
        await self._loader.bring(self._keys)

    async def __aexit__(self, *_: object) -> None:
        self._loader.release(self._keys)


def group_of(row: Row, attempts: Sequence[Row], spans: Sequence[SpanTotals]) -> Group:
    longest = max((len(one.body) for one in attempts), default=0)
    return Group(
        rollout=record_of(row, Rollout),
        created=row.columns[0],
        attempts=[record_of(one, Attempt) for one in attempts],
        spans=spans,
        body_bytes=(len(row.body), longest),
    )
