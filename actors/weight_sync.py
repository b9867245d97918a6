"""WeightSync: brings each weight version from the learner into every engine. One actor per run, named `weight_sync`.

    controller --publish(manifest)--> [weight_sync] --send_weights(order)--> learner rank 0 ---+
                                       |      ^                                              | buckets (gloo, nccl, object store)
                        order (poll)   v      | report (checksum, pause)                      v
                                      engine replicas <------------------------------------- group

Engines register and follow by long poll, since nobody can address one replica of a Serve deployment. One that registers late (started, or
restarted by Serve) is brought to the current version at once, before it serves. The actor holds no weights and no torch; when it dies it is
restarted empty and the engines, which carry the last manifest, tell it where things stand.
Consumes: `publish`, `register`, `report`. Waits for: the learner's send, the reports; all to one deadline.
Test alone: `pytest tests/integration/test_weights_sync.py` (real actors and groups, no vLLM).
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.weight_courier import Courier, Delivery, Follower, SenderLost
from agl_ray.config.models import RunConfig, WeightsConfig
from agl_ray.ops.events import Notice
from agl_ray.types.errors import NotFound, WeightSyncError

CATCH_UP_RETRY_SECONDS = 1.0

SETTLE_SECONDS = 5.0
"""How long a restarted weight_sync gives the engines to register again (they try every second) before it publishes."""


__all__ = ["SenderLost", "WeightSync", "create_weight_sync"]


class WeightSync:
    """The actor class; see the module. Make it with `create_weight_sync`."""

    def __init__(self, config: WeightsConfig, replicas: int) -> None:
        """`replicas`: how many engines the run has; more replica ids than that are replacements."""
        self._config, self._replicas = config, replicas
        self._seen: set[str] = set()
        self._followers: dict[str, Follower] = {}
        self._courier = Courier(config)
        self._manifest: dict[str, Any] | None = None
        self._delivering = asyncio.Lock()
        self._behind = asyncio.Event()
        self._news: list[Notice] = []
        self._catching_up: asyncio.Task[None] | None = None
        restarted = ray.get_runtime_context().was_current_actor_reconstructed
        self._settled_at = time.monotonic() + (SETTLE_SECONDS if restarted else 0.0)
        if restarted:
            text = "weight sync died and was restarted; the engines registered again"
            self._news.append(Notice(text=text, restarted="weight_sync"))

    async def ping(self) -> str:
        """`ok`, once the actor is up."""
        return "ok"

    async def status(self) -> dict[str, Any]:
        """`version` (last published, None before), `checksum`, `followers`: {replica_id: version}."""
        manifest = self._manifest or {}
        return {
            "version": manifest.get("version"),
            "checksum": manifest.get("checksum"),
            "followers": {f.replica_id: f.version for f in self._followers.values()},
        }

    async def take_news(self) -> list[Notice]:
        """Each engine replica that Serve started in place of a lost one, and this actor's own restart, since the last call."""
        news, self._news = self._news, []
        return news

    async def set_learner(self, learner: ActorHandle) -> None:
        """Take `learner` (rank 0; has `send_weights(order)`) as the sender from now on."""
        self._courier.learner = learner
        self._behind.set()

    # Followers ------------------------------------------------------------------------------------

    async def register(self, about: dict[str, Any]) -> None:
        """An engine replica follows from now on. `about`: replica_id, actor (its handle), device, version and checksum it has (None: none),
        known (manifest and learner of its last order, for an actor that has just been restarted)."""
        replica_id, version = about["replica_id"], about["version"]
        follower = self._followers.get(replica_id)
        if follower is None:
            follower = Follower(replica_id, about["actor"], about["device"])
            self._followers[replica_id] = follower
        follower.version, follower.checksum = version, about["checksum"]
        if replica_id not in self._seen:
            self._seen.add(replica_id)
            if len(self._seen) > self._replicas and version is None:
                text = f"engine replica {replica_id} was started in place of a lost one; it takes the current weights before it serves"
                self._news.append(Notice(text=text, restarted="engine"))
        known = about["known"]
        if self._manifest is None and known is not None:
            self._manifest, self._courier.learner = (
                known["manifest"],
                self._courier.learner or known["learner"],
            )
        if self._catching_up is None:
            self._catching_up = asyncio.create_task(self._catch_up())
        self._behind.set()

    async def next_order(self, replica_id: str, seconds: float) -> dict[str, Any] | None:
        """The order that waits for this replica; held open up to `seconds`, then None. NotFound: register (again)."""
        follower = self._follower(replica_id)
        try:
            await asyncio.wait_for(follower.posted.wait(), timeout=seconds)
        except TimeoutError:
            return None
        if follower.order is not None and "leave" in follower.order:
            self._followers.pop(replica_id, None)
        return follower.order

    async def report(self, report: dict[str, Any]) -> None:
        """What came of an order: order, replica_id, ok, checksum, seconds, pause_seconds, or error."""
        follower = self._follower(report["replica_id"])
        if follower.order is None or follower.order.get("order") != report["order"]:
            return  # of an order that was given up meanwhile
        if report["ok"]:
            follower.version, follower.checksum = follower.order["version"], report["checksum"]
        follower.order = None
        follower.posted.clear()
        if follower.report is not None and not follower.report.done():
            follower.report.set_result(report)

    def _follower(self, replica_id: str) -> Follower:
        try:
            return self._followers[replica_id]
        except KeyError:
            raise NotFound(
                f"weight_sync does not know engine replica {replica_id}: register it"
            ) from None

    # Publishing -----------------------------------------------------------------------------------

    async def publish(
        self, manifest: dict[str, Any], seconds: float | None = None
    ) -> dict[str, Any]:
        """Bring the version that the learner has staged into every engine that follows now; later ones get it when they register.

        `manifest`: of `WeightSender.manifest()`. `seconds`: deadline (default weights.timeout_seconds). May be called again.
        Returns version, seconds, pause_seconds and receive_seconds (of the slowest engine), followers (how many have it), transport,
        checksum, bytes, lost (replica ids that could not be brought along; they leave and Serve replaces them), notices (a sentence for each).
        Raises SenderLost when the learner died, WeightSyncError when no learner was set."""
        limit = seconds or self._config.timeout_seconds
        start = time.monotonic()
        # Just restarted, we know nobody yet; publishing to nobody would let the old weights serve on for a moment.
        await asyncio.sleep(max(0.0, self._settled_at - start))
        async with self._delivering:
            self._manifest = manifest
            members = [f for f in self._followers.values() if not f.has(manifest)]
            done = await self._deliver(members, manifest, start + limit)
            for follower in done.behind:
                why = f"version {manifest['version']} could not be brought to it"
                done.lose(follower.replica_id, why)
                follower.post({"order": 0, "leave": why})
        reports = done.reports.values()
        return {
            "version": manifest["version"],
            "checksum": manifest["checksum"],
            "bytes": sum(bucket["nbytes"] for bucket in manifest["buckets"]),
            "seconds": time.monotonic() - start,
            "pause_seconds": max((r["pause_seconds"] for r in reports), default=0.0),
            "receive_seconds": max((r.get("receive_seconds", 0.0) for r in reports), default=0.0),
            "followers": sum(f.has(manifest) for f in self._followers.values()),
            "transport": done.transport,
            "lost": sorted(done.lost),
            "notices": done.notices,
        }

    async def _catch_up(self) -> None:
        """Bring whoever registers late to the current version; for ever."""
        while True:
            await self._behind.wait()
            self._behind.clear()
            async with self._delivering:
                manifest = self._manifest
                if manifest is None or self._courier.learner is None:
                    continue  # the first publish or set_learner wakes us
                late = [f for f in self._followers.values() if not f.has(manifest)]
                try:
                    done = await self._deliver(
                        late, manifest, time.monotonic() + self._config.timeout_seconds
                    )
                except WeightSyncError:
                    done = Delivery()  # no learner just now: the next one wakes us
            if (
                done.behind
            ):  # perhaps a newer version is being staged: not its fault, so it is not sent away
                await asyncio.sleep(CATCH_UP_RETRY_SECONDS)
                self._behind.set()

    async def _deliver(
        self, members: list[Follower], manifest: dict[str, Any], deadline: float
    ) -> Delivery:
        done = await self._courier.deliver(members, manifest, deadline)
        for replica_id in done.lost:
            self._followers.pop(replica_id, None)
        return done


def create_weight_sync(config: RunConfig, namespace: str) -> ActorHandle:
    """Start the run's `weight_sync` actor (it lives as long as its creator's job, and is restarted when it dies)."""
    actor: ActorHandle = (
        ray.remote(WeightSync)
        .options(
            name="weight_sync",
            namespace=namespace,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            get_if_exists=True,
        )
        .remote(config.weights, config.engine.replicas)
    )
    return actor
