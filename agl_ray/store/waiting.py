"""Who waits for what inside the store: conditions that wake exactly those whose wait is over.

What it is: `QueueWaiters` (takers of an empty queue, first come first served), `FinalWaiters` (callers of `wait_for_rollouts`),
`SpanWaiters` (ends that wait for their last spans), `Backlog` (who gives the queue more takers). All on one event loop; nothing polls.
Who calls it: `agl_ray.store.core`. Test alone: tests/unit/test_store_waiting.py.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable

from agl_ray.store.state import AttemptKey


class QueueWaiters:
    """Takers that found the queue empty, in order of arrival."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[asyncio.Future[bool], str | None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    def wake(self, count: int) -> None:
        """Wake as many takers as there are new rollouts."""
        for _ in range(min(count, len(self._waiting))):
            future, _worker = self._waiting.popitem(last=False)
            future.set_result(True)

    def drop_worker(self, worker_id: str) -> None:
        """Send the takers of a dead worker away: nothing must be leased to it."""
        for future in [one for one, worker in self._waiting.items() if worker == worker_id]:
            del self._waiting[future]
            future.set_result(False)

    def fail(self, error: Exception) -> None:
        while self._waiting:
            future, _ = self._waiting.popitem()
            future.set_exception(error)

    async def wait(self, worker_id: str | None, seconds: float) -> bool:
        """Wait to be woken, or `seconds`; False: go away (`drop_worker`). Cancelled after it was woken, it wakes the next."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting[future] = worker_id
        try:
            await asyncio.wait([future], timeout=seconds)
            return future.result() if future.done() else True
        except asyncio.CancelledError:
            if future.done() and future.result():
                self.wake(1)
            raise
        finally:
            self._waiting.pop(future, None)


class _Counted:
    """Done when `count` reaches `need`."""

    def __init__(self, count: int, need: int) -> None:
        self.count, self.need = count, need
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def add(self, number: int) -> None:
        self.count += number
        if self.count >= self.need and not self.future.done():
            self.future.set_result(None)

    async def wait(self, seconds: float | None) -> None:
        """Until done or `seconds` are over; raises what the future was failed with."""
        done, _ = await asyncio.wait([self.future], timeout=seconds)
        if done:
            self.future.result()


class FinalWaiters:
    """Callers that wait until enough of their rollouts are final."""

    def __init__(self) -> None:
        self._of_rollout: dict[str, dict[_Counted, None]] = {}

    def final(self, rollout_id: str) -> None:
        """A rollout became final."""
        for waiter in self._of_rollout.pop(rollout_id, ()):
            waiter.add(1)

    def fail(self, error: Exception) -> None:
        for waiter in {one for waiters in self._of_rollout.values() for one in waiters}:
            if not waiter.future.done():
                waiter.future.set_exception(error)

    async def wait(self, rollout_ids: Iterable[str], need: int, seconds: float | None) -> None:
        """Until `need` of these (all distinct, none final now) are final, or `seconds` are over."""
        waiter = _Counted(0, need)
        ids = list(rollout_ids)
        for rollout_id in ids:
            self._of_rollout.setdefault(rollout_id, {})[waiter] = None
        try:
            await waiter.wait(seconds)
        finally:
            for rollout_id in ids:
                waiters = self._of_rollout.get(rollout_id, {})
                waiters.pop(waiter, None)
                if not waiters:
                    self._of_rollout.pop(rollout_id, None)


class SpanWaiters:
    """Ends of attempts whose last spans are still on their way."""

    def __init__(self) -> None:
        self._of_attempt: dict[AttemptKey, list[_Counted]] = {}

    def arrived(self, key: AttemptKey, number: int) -> None:
        for waiter in self._of_attempt.get(key, ()):
            waiter.add(number)

    def fail(self, error: Exception) -> None:
        for waiter in [one for waiters in self._of_attempt.values() for one in waiters]:
            if not waiter.future.done():
                waiter.future.set_exception(error)

    async def wait(self, key: AttemptKey, have: int, need: int, seconds: float) -> None:
        """Until the attempt has `need` spans, or `seconds` are over."""
        waiter = _Counted(have, need)
        self._of_attempt.setdefault(key, []).append(waiter)
        try:
            await waiter.wait(seconds)
        finally:
            self._of_attempt[key].remove(waiter)
            if not self._of_attempt[key]:
                del self._of_attempt[key]


class Backlog:
    """Rollouts that wait although there are takers, or for want of them: told to whoever can send more takers."""

    def __init__(self) -> None:
        self._waiting = 0
        self._changed: set[asyncio.Future[None]] = set()

    def note(self, waiting: int) -> None:
        """So many rollouts are in the queue now."""
        emptied_or_filled = (waiting > 0) != (self._waiting > 0)
        self._waiting = waiting
        if emptied_or_filled:
            self._each(lambda one: one.set_result(None))

    def fail(self, error: Exception) -> None:
        self._each(lambda one: one.set_exception(error))

    def _each(self, settle: Callable[[asyncio.Future[None]], None]) -> None:
        for one in self._changed:
            if not one.done():
                settle(one)

    async def wait(self, standing: float, seconds: float) -> int:
        """How many wait, once the queue has not been empty for `standing` seconds from now on; 0 where it always was within `seconds`."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + seconds
        since = loop.time() if self._waiting else None
        while True:
            until = give_up if since is None else since + standing
            if loop.time() >= min(until, give_up):
                return self._waiting if since is not None and until <= give_up else 0
            if await self._change(min(until, give_up) - loop.time()):
                since = loop.time() if self._waiting else None

    async def _change(self, seconds: float) -> bool:
        """Whether the queue was emptied or filled within `seconds`."""
        changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._changed.add(changed)
        try:
            await asyncio.wait([changed], timeout=seconds)
            if changed.done():
                changed.result()
            return changed.done()
        finally:
            self._changed.discard(changed)
