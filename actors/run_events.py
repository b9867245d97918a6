"""RunEvents: what the controller tells its driver, in order, kept from the start of its life.

A helper inside the controller; the driver reads it by long polls with a cursor. Test alone: tests/unit/test_run_events.py.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from agl_ray.ops.events import Event, Notice


class RunEvents:
    """on_notice: called with every notice, for the summary's list of what happened."""

    def __init__(self, on_notice: Callable[[Notice], None]) -> None:
        self._on_notice = on_notice
        self._events: list[Event] = []
        self._told = asyncio.Condition()

    async def since(self, cursor: int, wait_seconds: float) -> list[Event]:
        """The events from number `cursor` on; waits up to `wait_seconds` for the first of them."""
        async with self._told:
            if len(self._events) <= cursor:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._told.wait(), wait_seconds)
            return self._events[cursor:]

    async def tell(self, event: Event) -> None:
        if isinstance(event, Notice):
            self._on_notice(event)
        async with self._told:
            self._events.append(event)
            self._told.notify_all()

    async def notice(self, text: str, restarted: str | None = None) -> None:
        """A sentence for the person; `restarted`: the kind of process that died and was replaced."""
        await self.tell(Notice(text=text, restarted=restarted))

    def tell_soon(self, event: Event) -> None:
        """`tell` from a callback."""
        task = asyncio.ensure_future(self.tell(event))
        task.add_done_callback(lambda done: done.exception())
