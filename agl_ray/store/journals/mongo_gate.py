"""Many readers or one writer, on one event loop.

What it is: `Gate`. MongoDB shows a write of several documents bit by bit where it has no transactions, and a cursor may see a
transaction's half; so reads of the one store that owns a run keep out of the moment in which a write becomes visible. A
writer that waits goes before readers that come later.
Who calls it: `agl_ray.store.journals.mongo`. Test alone: tests/unit/test_store_mongo_parts.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class Gate:
    """`async with gate.among():` for readers, `async with gate.alone():` for a writer. Leaving never waits, so a cancelled task
    cannot keep the gate."""

    def __init__(self) -> None:
        self._readers = 0
        self._writers = 0  # writing or waiting
        self._writing = False
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def among(self) -> AsyncIterator[None]:
        await self._until(lambda: self._writers == 0)
        self._readers += 1
        try:
            yield
        finally:
            self._readers -= 1
            self._tell()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        self._writers += 1
        try:
            await self._until(lambda: self._readers == 0 and not self._writing)
            self._writing = True
            try:
                yield
            finally:
                self._writing = False
        finally:
            self._writers -= 1
            self._tell()

    async def _until(self, ready: Callable[[], bool]) -> None:
        while not ready():
            await self._changed.wait()

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
