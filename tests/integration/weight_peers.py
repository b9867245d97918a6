"""The two ends of weight sync as plain actors: a sender that owns WeightSenders (what learner rank 0 does), a follower without vLLM.

Both use the product's own classes for all that travels; only the model behind them is a list of random tensors.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import ray


@ray.remote(num_cpus=0, max_concurrency=4)
class Sender:
    """`stage` makes a version (from a model folder, or random), `send_weights` is what weight_sync calls."""

    def __init__(self, bucket_bytes: int = 1 << 20) -> None:
        self._bucket_bytes = bucket_bytes
        self._sender: Any = None

    def stage(self, version: int, tensors: list[tuple[str, Any]] | None = None) -> dict[str, Any]:
        import torch

        from agl_ray.weights.sender import WeightSender

        if tensors is None:
            rng = torch.Generator().manual_seed(version)
            tensors = [(f"t{i}", torch.randn(5000, generator=rng)) for i in range(6)]
        else:
            tensors = [(name, torch.from_numpy(array.copy())) for name, array in tensors]
        self._sender = WeightSender(tensors, version, self._bucket_bytes)
        manifest: dict[str, Any] = self._sender.manifest()
        return manifest

    def send_weights(self, order: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = self._sender.send(order)
        return answer

    def pid(self) -> int:
        return os.getpid()


@ray.remote(num_cpus=0, max_concurrency=16)
class PlainEngine:
    """Follows weight_sync as an engine replica does; `applied` is what it would have loaded."""

    def __init__(self, namespace: str, replica_id: str) -> None:
        from actors.engine_weights import WeightFollower
        from agl_ray.weights.receiver import Receiver

        self._receiver = Receiver()
        self._follower = WeightFollower(
            self, namespace, {"replica_id": replica_id, "device": "cpu"}
        )
        self._task: asyncio.Task[None] | None = None
        self._checksum = ""
        self.applied: list[tuple[int, str]] = []
        self.failure = ""
        self.break_apply = self.break_receive = False

    async def start(self, seconds: float) -> list[tuple[int, str]]:
        await self._follower.first(seconds)
        self._task = asyncio.create_task(self._follower.run())
        return self.applied

    async def set(self, **flags: bool) -> None:
        for name, value in flags.items():
            setattr(self, name, value)

    async def state(self) -> dict[str, Any]:
        return {"applied": self.applied, "failure": self.failure, "pid": os.getpid()}

    async def receive_weights(self, order: dict[str, Any]) -> dict[str, Any]:
        if self.break_receive and order["transport"] != "files":
            return {"ok": False, "error": "broken on purpose"}
        self._receiver.begin(order)
        while (outcome := self._receiver.outcome()) is None:  # noqa: ASYNC110  a thread sets it
            await asyncio.sleep(0.005)
        if outcome["ok"]:
            self._checksum = outcome["checksum"]
        return outcome

    async def apply_weights(self, version: int) -> float:
        if self.break_apply:
            raise RuntimeError("broken on purpose")
        assert len(list(self._receiver.take(version))) > 0
        self.applied.append((version, self._checksum))
        return 0.01

    def fail(self, why: str) -> None:
        self.failure = why
