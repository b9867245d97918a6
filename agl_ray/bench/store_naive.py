"""What one writes first: a Ray actor around dictionaries, one actor call per method, spans one by one.

It checks nothing, waits for nothing and keeps nothing beyond its process; it is here to be compared with. Called by
`agl_ray.bench.store`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from agl_ray.bench.store_flow import SPANS, Material
from agl_ray.waits import wait

SECONDS = 60.0


class NaiveStore:
    """The actor class: a queue and two dictionaries."""

    def __init__(self) -> None:
        self.rollouts: dict[str, dict[str, Any]] = {}
        self.spans: dict[str, list[dict[str, Any]]] = {}
        self.queue: deque[str] = deque()
        self._numbers = itertools.count()

    async def pid(self) -> int:
        return os.getpid()

    async def enqueue_rollout(self, input: Any) -> dict[str, Any]:
        rollout_id = f"ro-{next(self._numbers):012x}"
        self.rollouts[rollout_id] = {"rollout_id": rollout_id, "input": input, "status": "queuing"}
        self.queue.append(rollout_id)
        return self.rollouts[rollout_id]

    async def dequeue_rollout(self, worker_id: str) -> dict[str, Any] | None:
        if not self.queue:
            return None
        rollout = self.rollouts[self.queue.popleft()]
        rollout["attempt_id"], rollout["worker_id"] = f"at-{next(self._numbers):08x}", worker_id
        rollout["status"] = "running"
        return rollout

    async def add_span(self, span: dict[str, Any]) -> None:
        self.spans.setdefault(span["rollout_id"], []).append(span)

    async def update_attempt(self, rollout_id: str, attempt_id: str, status: str) -> dict[str, Any]:
        rollout = self.rollouts[rollout_id]
        if rollout["attempt_id"] == attempt_id:
            rollout["status"] = status
        return rollout

    async def totals(self) -> tuple[int, int]:
        succeeded = sum(one["status"] == "succeeded" for one in self.rollouts.values())
        return succeeded, sum(map(len, self.spans.values()))


class NaiveFlows:
    """The benchmark's flow through that actor."""

    def __init__(self, handle: Any, profile: str) -> None:
        self._handle, self._material = handle, Material(profile)

    async def _call(self, name: str, *arguments: Any) -> Any:
        ref = getattr(self._handle, name).remote(*arguments)
        return await wait(ref, on=f"the naive store to answer {name}", seconds=SECONDS)

    async def enqueue(self, number: int) -> None:
        for i in range(number):
            await self._call("enqueue_rollout", {"i": i})

    async def flow(self, worker_id: str) -> bool:
        rollout = await self._call("dequeue_rollout", worker_id)
        if rollout is None:
            return False
        key = (rollout["rollout_id"], rollout["attempt_id"])
        for _ in range(SPANS):
            await self._call("add_span", self._material.row(*key))
        await self._call("update_attempt", *key, "succeeded")
        return True

    async def totals(self) -> tuple[int, int]:
        succeeded, spans = await self._call("totals")
        return succeeded, spans


@contextlib.asynccontextmanager
async def naive_actor() -> AsyncIterator[tuple[Any, int]]:
    """(handle, pid) of a fresh naive store."""
    import ray

    handle = ray.remote(NaiveStore).options(num_cpus=0, max_concurrency=1000).remote()
    try:
        yield handle, await wait(handle.pid.remote(), on="the naive store to start", seconds=60)
    finally:
        ray.kill(handle)
