"""Many add_spans calls of one process in few messages.

What it is: calls that arrive while a message is on its way wait for the next one and travel in it together; a lone call leaves at
once. A message to an actor costs about the same for one batch as for fifty.
Who calls it: `agl_ray.store.client`. Test alone: tests/unit/test_store_client.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from weakref import WeakKeyDictionary

from agl_ray.store.core import SpanItem
from agl_ray.store.state import BatchEntry

IN_FLIGHT = 2  # messages on their way: one is carried out while the next one travels
MOST_ITEMS = 256
MOST_BYTES = 8 * 2**20  # per message

Call = Callable[..., Awaitable[Any]]


class SpanLanes:
    """One lane per event loop (a client may be used from several)."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._lanes: WeakKeyDictionary[asyncio.AbstractEventLoop, _Lane] = WeakKeyDictionary()

    async def send(self, item: SpanItem) -> BatchEntry:
        """Where the store put the batch, or its error raised."""
        loop = asyncio.get_running_loop()
        lane = self._lanes.get(loop)
        if lane is None:
            lane = self._lanes[loop] = _Lane(self._call)
        return await lane.send(item)


class _Lane:
    def __init__(self, call: Call) -> None:
        self._call = call
        self._waiting: list[tuple[SpanItem, asyncio.Future[BatchEntry]]] = []
        self._senders: set[asyncio.Task[None]] = set()

    async def send(self, item: SpanItem) -> BatchEntry:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[BatchEntry] = loop.create_future()
        self._waiting.append((item, future))
        if len(self._senders) < IN_FLIGHT:
            sender = loop.create_task(self._send_all(), name="store-span-lane")
            self._senders.add(sender)
            sender.add_done_callback(self._senders.discard)
        return await future

    async def _send_all(self) -> None:
        while self._waiting:
            batch = self._next()
            try:
                results = await self._call("add_spans", [item for item, _ in batch])
            except BaseException as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error) if isinstance(
                            error, Exception
                        ) else future.cancel()
                if not isinstance(error, Exception):
                    raise
                continue
            for (_, future), result in zip(batch, results, strict=True):
                if future.done():
                    continue  # its caller was cancelled
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)

    def _next(self) -> list[tuple[SpanItem, asyncio.Future[BatchEntry]]]:
        size = number = 0
        for item, _ in self._waiting[:MOST_ITEMS]:
            size += len(item[4])
            if number and size > MOST_BYTES:
                break
            number += 1
        batch, self._waiting = self._waiting[:number], self._waiting[number:]
        return batch
