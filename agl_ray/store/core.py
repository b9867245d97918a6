"""The LightningStore in one process: its commands, over `agl_ray.store.base`.

What it is: the public coroutines here, in `agl_ray.store.spans`, `agl_ray.store.lists` and `agl_ray.store.reads` are the wire interface;
`LightningStore` documents them.
Who calls it: `actors.store.Store` (over Ray), `agl_ray.store.client.LightningStore.local` (in-process). Test alone:
tests/unit/test_store_core.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from agl_ray.store.base import rollouts
from agl_ray.store.journals.base import AttemptKey
from agl_ray.store.residents import Key
from agl_ray.store.spans import SpanItem, Spans
from agl_ray.types import (
    Attempt,
    AttemptedRollout,
    EndReason,
    EnqueueRolloutRequest,
    NamedResources,
    ResourcesUpdate,
    Rollout,
    Worker,
    new_id,
    replace,
)

READ_AHEAD = 64  # waiting rollouts that come back to memory together with the one that is taken


class StoreCore(Spans):
    """Make it with `await StoreCore.open(url, ...)`; end it with `await close()`."""

    # Commands.

    async def add_resources(self, resources_id: str, resources: NamedResources) -> ResourcesUpdate:
        needs = [("resources", resources_id)]
        return await self._do(self.machine.add_resources, resources_id, resources, needs=needs)

    async def update_resources(
        self, resources_id: str, resources: NamedResources, repeated: bool = False
    ) -> ResourcesUpdate:
        needs = [("resources", resources_id)]
        command = self.machine.update_resources
        return await self._do(command, resources_id, resources, repeated=repeated, needs=needs)

    async def enqueue(self, requests: Sequence[EnqueueRolloutRequest]) -> list[Rollout]:
        named = [_named(request) for request in requests]
        return await self._do(self.machine.enqueue, named, needs=_needs(named))

    async def dequeue(
        self, limit: int, worker_id: str | None, wait_seconds: float, request_id: str | None
    ) -> list[AttemptedRollout]:
        """Waits at most `wait_seconds` for the first rollout; then takes what is there, at most `limit`."""
        give_up = self.loop.time() + wait_seconds
        while True:
            taken = await self._take(limit, worker_id, request_id)
            left = give_up - self.loop.time()
            if taken or left <= 0:
                return await self._committed(taken)
            self._submit()
            if not await self._takers.wait(worker_id, left):
                return []  # the worker was declared dead meanwhile

    async def _take(
        self, limit: int, worker_id: str | None, request_id: str | None
    ) -> list[AttemptedRollout]:
        """The head of the queue may have left memory; it comes back with some of those behind it. So may what a repeated call took."""
        state = self.machine.state

        def wanted(number: int) -> Sequence[str]:
            again = state.requests.made_by(request_id)
            return [key[0] for key in again] if again else state.first_waiting(number)

        take = functools.partial(
            self._run, self.machine.dequeue, limit=limit, worker_id=worker_id, request_id=request_id
        )
        while True:
            self._check()
            if all(one in state.rollouts for one in wanted(limit)):
                return take()
            async with self._present(rollouts(wanted(limit + READ_AHEAD))):
                if all(one in state.rollouts for one in wanted(limit)):
                    return take()

    async def start_rollout(
        self, request: EnqueueRolloutRequest, worker_id: str | None, request_id: str
    ) -> AttemptedRollout:
        named = _named(request)
        command = self.machine.start_rollout
        needs = _needs([named]) + self._made_by(request_id)
        return await self._do(command, named, worker_id, request_id, needs=needs)

    async def start_attempt(
        self, rollout_id: str, worker_id: str | None, request_id: str
    ) -> AttemptedRollout:
        needs = rollouts([rollout_id]) + self._made_by(request_id)
        command = self.machine.start_attempt
        return await self._do(command, rollout_id, worker_id, request_id, needs=needs)

    def _made_by(self, request_id: str) -> list[Key]:
        return rollouts(key[0] for key in self.machine.state.requests.made_by(request_id))

    async def cancel_rollouts(self, rollout_ids: Sequence[str]) -> list[Rollout]:
        needs = rollouts(rollout_ids)
        return await self._do(self.machine.cancel_rollouts, rollout_ids, needs=needs)

    async def update_rollout(self, rollout_id: str, fields: dict[str, Any]) -> Rollout:
        needs = rollouts([rollout_id])
        if isinstance(fields.get("resources_id"), str):
            needs.append(("resources", fields["resources_id"]))
        return await self._do(self.machine.update_rollout, rollout_id, needs=needs, **fields)

    async def update_attempt(
        self, rollout_id: str, attempt_id: str, fields: dict[str, Any]
    ) -> Attempt:
        needs = rollouts([rollout_id])
        command = self.machine.update_attempt
        return await self._do(command, rollout_id, attempt_id, needs=needs, **fields)

    async def end_attempt(
        self,
        rollout_id: str,
        attempt_id: str,
        reason: EndReason,
        reward: float | None = None,
        error: str | None = None,
        expected_spans: int | None = None,
        patient: bool = True,
        item: SpanItem | None = None,
    ) -> Attempt | None:
        """patient: wait for spans that are missing; where not, None says that there are such, and nothing was done. item: the last
        spans, stored in the commit of the end; where they cannot be, their error is raised and the attempt goes on."""
        self._check()
        if item is not None:
            await self._add_last(item)
        if expected_spans and reason is EndReason.OK:
            if not patient and await self._lacks((rollout_id, attempt_id), expected_spans):
                return None
            num_spans = await self._spans_of((rollout_id, attempt_id), expected_spans)
            if num_spans < expected_spans:
                reason = EndReason.LOST
                error = (
                    f"only {num_spans} of the attempt's {expected_spans} spans reached the store"
                )
        command = functools.partial(self.machine.end_attempt, reward=reward, error=error)
        return await self._do(command, rollout_id, attempt_id, reason, needs=rollouts([rollout_id]))

    async def _lacks(self, key: AttemptKey, expected: int) -> bool:
        async with self._present(rollouts([key[0]])):
            attempt = self.machine.state.attempt(*key)
            return not attempt.status.final and attempt.num_spans < expected

    async def _spans_of(self, key: AttemptKey, expected: int) -> int:
        """How many spans of the attempt are here, once there are `expected` or the time for stragglers is over; `expected`
        where it has ended already, which makes them no matter."""
        state = self.machine.state
        if key in state.open and (number := state.attempt(*key).num_spans) >= expected:
            return number
        async with self._present(rollouts([key[0]])):
            attempt = state.attempt(*key)
            if attempt.status.final:
                return expected
            if attempt.num_spans < expected:
                key = (attempt.rollout_id, attempt.attempt_id)
                await self._ends.wait(key, attempt.num_spans, expected, self._span_seconds)
            return state.attempt(*key).num_spans

    async def forget(self, rollout_ids: Sequence[str]) -> None:
        """Remove rollouts with their attempts and spans. Unknown ones are left out; Conflict (and nothing removed) where one
        is not final."""
        async with self._present(rollouts(rollout_ids)):
            self._submit()
            keys = [
                (one, attempt)
                for one in rollout_ids
                for attempt in self.machine.state.attempts.get(one, ())
            ]
            known = self._run(self.machine.forget, rollout_ids)
            if known:
                self._cache.drop(keys)
                self._loader.forgetting.update(known)
                gone = self._send(self._group.forget(known))
                gone.add_done_callback(lambda _: self._loader.forgetting.difference_update(known))
        await self._committed(None)

    async def update_worker(
        self, worker_id: str, stats: Any, attempts: Sequence[AttemptKey]
    ) -> Worker:
        return await self._do(
            self.machine.update_worker, worker_id, heartbeat_stats=stats, attempts=attempts
        )

    async def worker_lost(self, worker_id: str, why: str) -> list[Attempt]:
        self._takers.drop_worker(worker_id)
        return await self._do(self.machine.worker_lost, worker_id, why)

    async def put_state(self, key: str, value: bytes) -> None:
        await self._do(self.machine.put_value, key, value)


def _named(request: EnqueueRolloutRequest) -> EnqueueRolloutRequest:
    """With an id, so that it can be asked whether the store knows it."""
    return request if request.rollout_id else replace(request, rollout_id=new_id("ro"))


def _needs(requests: Sequence[EnqueueRolloutRequest]) -> list[Key]:
    needs = rollouts(str(request.rollout_id) for request in requests)
    named = {request.resources_id for request in requests}
    return needs + [("resources", one) for one in named if one is not None]
