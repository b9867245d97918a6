"""WeightFollower: the part of an engine replica that follows the weight_sync actor. A helper inside `actors/engine.py`, without vLLM.

Consumes orders ("take version 7: this manifest, this group, this long"), one at a time, by long poll; produces reports.
Receiving goes on beside generation. Applying pauses the engine with its calls held; if it breaks, the weights are in pieces, so the engine is
closed at once (its calls end as engine errors, never with an answer) and Serve replaces the replica.
Test alone: `pytest tests/integration/test_weights_sync.py` (real actors, no vLLM).
"""

from __future__ import annotations

import asyncio
import shutil
import time
from typing import Any, Protocol

import ray

from agl_ray.types.errors import NotFound, WaitTimeout, WeightSyncError
from agl_ray.waits import wait
from agl_ray.weights.scratch import scratch

POLL_SECONDS = 20.0
"""How long one long poll is held open."""

RETRY_SECONDS = 1.0
"""Pause before weight_sync is looked for again while it restarts."""


class WeightTaker(Protocol):
    """What the follower needs of an engine."""

    async def receive_weights(self, order: dict[str, Any]) -> dict[str, Any]:
        """Take the version into memory while generating; {"ok", "checksum", "receive_seconds", "error"}."""

    async def apply_weights(self, version: int) -> float:
        """Pause, load, resume; seconds of the pause."""

    def fail(self, why: str) -> None:
        """The replica cannot go on: close the engine, let the health check say why."""


class WeightFollower:
    """`about` is what weight_sync needs to know of the replica: `replica_id` and `device` (cpu or cuda)."""

    def __init__(self, taker: WeightTaker, namespace: str, about: dict[str, Any]) -> None:
        self._taker, self._namespace = taker, namespace
        self._about = about
        self.replica_id: str = about["replica_id"]
        self.version: int | None = None
        self.checksum: str | None = None
        self._known: dict[str, Any] | None = None
        self._sync: Any = None
        self._reported: dict[str, Any] | None = None

    async def first(self, seconds: float) -> None:
        """Follow until the first weights are in; WaitTimeout when none came within `seconds`."""
        deadline = time.monotonic() + seconds
        while self.version is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise WaitTimeout(
                    f"the first weights of engine replica {self.replica_id}",
                    seconds,
                    "nothing was published, or the learner could not send it (engine.start_seconds)",
                )
            await self._turn(min(left, POLL_SECONDS))

    async def run(self) -> None:
        """Follow for ever; ends by cancellation, or by telling the engine that it has failed."""
        while True:
            try:
                await self._turn(POLL_SECONDS)
            except WeightSyncError as error:
                self._taker.fail(f"it cannot follow the weights: {error}")
                return

    async def _turn(self, seconds: float) -> None:
        """One long poll and what it brings. weight_sync being away is waited out: it restarts and we register again."""
        try:
            if self._sync is None:
                await self._register()
            order = await wait(
                self._sync.next_order.remote(self.replica_id, seconds),
                on="weight_sync's next order",
                seconds=seconds + 30,
            )
            if order is not None:
                await self._carry_out(order)
        except (ray.exceptions.RayActorError, NotFound, WaitTimeout):
            self._sync = None
            await asyncio.sleep(RETRY_SECONDS)

    async def _register(self) -> None:
        try:
            sync = ray.get_actor("weight_sync", namespace=self._namespace)
        except ValueError as error:  # Ray's way to say that there is none (yet)
            raise NotFound(f"no actor weight_sync in namespace {self._namespace}") from error
        about = self._about | {
            "version": self.version,
            "checksum": self.checksum,
            "known": self._known,
            "actor": ray.get_runtime_context().current_actor,
        }
        await wait(
            sync.register.remote(about), on="weight_sync to register this engine", seconds=30
        )
        self._sync = sync

    async def _carry_out(self, order: dict[str, Any]) -> None:
        if "leave" in order:
            raise WeightSyncError(order["leave"])
        if self._reported is None or self._reported["order"] != order["order"]:
            self._reported = await self._obey(order)
        await wait(
            self._sync.report.remote(self._reported),
            on="weight_sync to take a report",
            seconds=30,
        )
        if self._reported.get("leaving"):
            raise WeightSyncError(self._reported["error"])

    async def _obey(self, order: dict[str, Any]) -> dict[str, Any]:
        """Receive and apply; the report. `leaving`: the weights are in pieces, this replica must be replaced."""
        start = time.monotonic()
        received = await self._receive(order)
        report = received | {"order": order["order"], "replica_id": self.replica_id}
        if not received["ok"]:
            return report
        version = order["version"]
        try:
            report["pause_seconds"] = await self._taker.apply_weights(version)
        except Exception as error:  # noqa: BLE001  whatever it was, the replica reports it and leaves
            why = f"applying version {version} failed: {error!r}"
            return report | {"ok": False, "error": why, "leaving": True}
        self.version, self.checksum = version, received["checksum"]
        self._known = {"manifest": order["manifest"], "learner": order["learner"]}
        return report | {"seconds": time.monotonic() - start}

    async def _receive(self, order: dict[str, Any]) -> dict[str, Any]:
        # Only plain data goes on into the engine's processes.
        plain = {key: order[key] for key in ("version", "manifest", "transport", "seconds")}
        if order["transport"] != "object_store":
            return await self._taker.receive_weights(plain | {"group": order["group"]})
        folder = scratch(sum(bucket["nbytes"] for bucket in order["manifest"]["buckets"]))
        try:
            files = []
            for i, ref in enumerate(order["refs"]):
                array = await wait(
                    ref,
                    on=f"bucket {i} of the weights in Ray's object store",
                    seconds=order["seconds"],
                )
                files.append(str(folder / str(i)))
                await asyncio.to_thread(array.tofile, files[-1])
            return await self._taker.receive_weights(plain | {"transport": "files", "files": files})
        except (ray.exceptions.RayError, WaitTimeout, OSError) as error:
            return {"ok": False, "error": f"{type(error).__name__}: {error}"}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
