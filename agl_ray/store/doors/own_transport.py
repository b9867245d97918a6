"""OwnTransport: to a store that this process owns, opens again after a failure, and ends in order.

Who calls it: `agl_ray/cli/store_serve.py`. Test alone: tests/integration/test_store_serve.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from agl_ray import waits
from agl_ray.store.doors import wire
from agl_ray.store.lane import Command, answer_each
from agl_ray.store.transport import StoreAway


class OwnTransport:
    """run: carries a command out by name, on the event loop of the store; the store's end is its owner's business."""

    def __init__(self, run: Callable[..., Awaitable[Any]]) -> None:
        self._run = run
        self._leaving = asyncio.Event()

    def gathers(self) -> bool:
        """A message costs nothing here."""
        return False

    async def call(self, command: str, *arguments: Any, seconds: float) -> Any:
        work = self._run(command, *arguments)
        if wire.commands()[command].blocks:
            work = self._unless_leaving(work)
        return await waits.wait(work, on=f"the store's answer to {command}", seconds=seconds)

    async def call_many(self, commands: Sequence[Command], *, seconds: float) -> list[Any]:
        on = f"the store's answers to {len(commands)} commands"
        return await waits.wait(answer_each(self._run, commands), on=on, seconds=seconds)

    async def _unless_leaving(self, work: Awaitable[Any]) -> Any:
        task = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(self._leaving.wait())
        try:
            await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise StoreAway("the store is being ended")
            return await task
        finally:
            task.cancel()
            leaving.cancel()

    def leave(self) -> None:
        """The store is about to end: whoever waits in it is sent away, and asks again."""
        self._leaving.set()

    async def close(self) -> None:
        """Nothing to end here."""
