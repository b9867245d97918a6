"""A pace: so many turns a minute, first come first served. A leaky bucket used as a queue (bucket of one).

Called by: whoever sends requests to a service with a rate limit. One event loop. Test alone: tests/unit/test_ops_pace.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


class Pace:
    """`await turn()` returns at most `per_minute` times a minute, evenly spread; a cancelled wait costs no turn.

    now: a clock in seconds, for tests.
    """

    def __init__(self, per_minute: float, now: Callable[[], float] = time.monotonic) -> None:
        self._interval, self._now = 60.0 / per_minute, now
        self._next = now()
        self._queue = asyncio.Lock()  # wakes its waiters in the order of their coming

    async def turn(self) -> None:
        async with self._queue:
            left = self._next - self._now()
            if left > 0:
                await asyncio.sleep(left)
            self._next = max(self._next, self._now()) + self._interval
