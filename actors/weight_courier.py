"""Courier: brings one weight version to a set of engine replicas. A helper inside `actors/weight_sync.py`.

Up to three attempts within one deadline: the collective, the collective again without whoever died or failed (always a new group: a broken one is
never used again), and Ray's object store. Deaths are noticed by asking Ray while an attempt runs, not by waiting for the deadline.
Test: `pytest tests/integration/test_weights_sync.py` (real actors and groups, no vLLM).
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle

from agl_ray.config.models import WeightsConfig
from agl_ray.types.errors import WaitTimeout, WeightSyncError
from agl_ray.waits import wait

PROBE_SECONDS = 0.5
"""How often a silent replica or learner is asked whether it is alive while an update runs."""

JOIN_SECONDS = 10.0
"""Most that members of a group wait for each other; they are asked at the same moment, so more means that one is stuck."""


class SenderLost(WeightSyncError):
    """The learner died while it should send; make it again, stage the version, publish again."""


@dataclass
class Follower:
    """One engine replica as weight_sync knows it."""

    replica_id: str
    actor: ActorHandle
    device: str
    version: int | None = None
    checksum: str | None = None
    order: dict[str, Any] | None = None
    """What it should do and has not reported yet; given again when it asks again."""
    posted: asyncio.Event = field(default_factory=asyncio.Event)
    report: asyncio.Future[dict[str, Any]] | None = None

    def post(self, order: dict[str, Any]) -> None:
        self.order = order
        self.report = asyncio.get_running_loop().create_future()
        self.posted.set()

    def has(self, manifest: dict[str, Any]) -> bool:
        return (self.version, self.checksum) == (manifest["version"], manifest["checksum"])


@dataclass
class Delivery:
    """What came of bringing one version to some replicas."""

    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    transport: str = "none"
    behind: list[Follower] = field(default_factory=list)
    """Alive, and still without the version after the last attempt."""

    def lose(self, replica_id: str, why: str) -> None:
        self.lost[replica_id] = why
        self.notices.append(f"engine replica {replica_id} is replaced by Serve: {why}")


class Courier:
    """Delivers versions, one delivery at a time; keeps the transfer group while its members stay the same.

    `learner` is rank 0's handle, with `send_weights(order)`; set by weight_sync."""

    def __init__(self, config: WeightsConfig) -> None:
        self._config = config
        self.learner: ActorHandle | None = None
        self._orders = itertools.count(1)
        self._incarnation = uuid.uuid4().hex[:8]
        self._group_key: tuple[Any, ...] | None = None
        self._group_id = ""

    async def deliver(
        self, members: list[Follower], manifest: dict[str, Any], deadline: float
    ) -> Delivery:
        """Up to three attempts, each with the members that still lack the version and are alive; a broken group is never used again."""
        done = Delivery()
        transports = self._transports(members, manifest)
        for i, transport in enumerate(transports):
            members = await self._living(members, done)
            if not members:
                break
            done.transport = transport
            share = (deadline - time.monotonic()) / (len(transports) - i)
            failed = await self._attempt(members, manifest, transport, max(share, 1.0), done)
            members = [f for f in members if f.replica_id in failed]
            for why in sorted(set(failed.values())):
                done.notices.append(
                    f"weights of version {manifest['version']} by {transport}: {why}"
                )
        done.behind = await self._living(members, done)
        return done

    def _transports(self, members: list[Follower], manifest: dict[str, Any]) -> list[str]:
        chosen: str = self._config.transport
        if chosen == "auto":
            gpus = manifest["device"] == "cuda" and all(f.device == "cuda" for f in members)
            chosen = "nccl" if gpus else "gloo"
        return [chosen, chosen, "object_store"]

    async def _attempt(
        self,
        members: list[Follower],
        manifest: dict[str, Any],
        transport: str,
        seconds: float,
        done: Delivery,
    ) -> dict[str, str]:
        """One try; {replica_id: why} of those that did not make it."""
        order = {
            "order": next(self._orders),
            "version": manifest["version"],
            "manifest": manifest,
            "transport": transport,
            "seconds": seconds,
            "learner": self.learner,
        }
        deadline = time.monotonic() + seconds
        if transport == "object_store":
            sent = await self._send(order, seconds)
            if "error" in sent:
                return dict.fromkeys((f.replica_id for f in members), sent["error"])
            self._post(members, order | {"refs": sent["refs"]}, {})
            failed = await self._reports(members, deadline, done)
        else:
            group = self._group(members, manifest, transport, seconds)
            self._post(members, order, group)
            sending = asyncio.create_task(self._send(order | {"group": group}, seconds))
            failed = await self._reports(members, deadline, done, sending)
            sent = await sending if sending.done() else {}
            sending.cancel()
            if failed:
                self._group_key = None
                if "error" in sent:
                    failed = dict.fromkeys(failed, sent["error"])
        return failed

    def _post(self, members: list[Follower], order: dict[str, Any], group: dict[str, Any]) -> None:
        for rank, follower in enumerate(members, start=1):
            follower.post(order | {"group": group | {"rank": rank}} if group else order)

    def _group(
        self, members: list[Follower], manifest: dict[str, Any], backend: str, seconds: float
    ) -> dict[str, Any]:
        """The group of these members: the last one when nothing has changed, else a new one."""
        key = (backend, manifest["sender"], *(f.replica_id for f in members))
        if key != self._group_key:
            self._group_key = key
            self._group_id = f"{self._incarnation}-{next(self._orders)}"
        return {
            "id": self._group_id,
            "backend": backend,
            "host": manifest["host"],
            "port": manifest["port"],
            "rank": 0,
            "world": len(members) + 1,
            "seconds": seconds,
            "join_seconds": min(JOIN_SECONDS, seconds / 2),
        }

    async def _send(self, order: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The learner's answer to the order, or {"error"}. SenderLost when it died."""
        if self.learner is None:
            raise WeightSyncError("no learner to send the weights: call set_learner before publish")
        try:
            answer = await wait(
                self.learner.send_weights.remote(order),
                on=f"the learner to send version {order['version']}",
                seconds=seconds + 5,
            )
        except ray.exceptions.RayActorError as error:
            raise SenderLost(
                f"the learner died while sending version {order['version']}: {error}"
            ) from error
        except (WeightSyncError, WaitTimeout) as error:
            return {"error": _first_line(error)}
        return dict(answer)

    async def _reports(
        self,
        members: list[Follower],
        deadline: float,
        done: Delivery,
        sending: asyncio.Task[dict[str, Any]] | None = None,
    ) -> dict[str, str]:
        """Collect the members' reports until all are in, the deadline passes, or nothing can come any more; the failures."""
        silent = {f.replica_id: f for f in members}
        failed: dict[str, str] = {}
        grace = deadline
        while silent and (left := min(grace, deadline) - time.monotonic()) > 0:
            waiting = [f.report for f in silent.values() if f.report is not None]
            if sending is not None:
                waiting.append(sending)  # type: ignore[arg-type]
            await asyncio.wait(
                waiting, timeout=min(left, PROBE_SECONDS), return_when=asyncio.FIRST_COMPLETED
            )
            if sending is not None and sending.done():
                # Its error ends the attempt for everybody: give the others a moment to notice by themselves.
                if "error" in sending.result():
                    grace = min(grace, time.monotonic() + 2.0)
                sending = None
            for follower in list(silent.values()):
                if follower.report is not None and follower.report.done():
                    del silent[follower.replica_id]
                    report = follower.report.result()
                    if report["ok"]:
                        done.reports[follower.replica_id] = report
                    elif report.get("leaving"):
                        done.lose(follower.replica_id, report["error"])
                    else:
                        failed[follower.replica_id] = report["error"]
            living = await self._living(list(silent.values()), done)
            if len(living) < len(silent):
                break  # a dead member: the group can never be complete
        for replica_id in silent:
            if replica_id not in done.lost:
                failed.setdefault(replica_id, "no report in time, or a peer died")
        return failed

    async def _living(self, members: list[Follower], done: Delivery) -> list[Follower]:
        """Those of `members` whose process lives; the others are forgotten and noted as lost."""
        answers = await asyncio.gather(*(_lives(f) for f in members))
        for follower, lives in zip(members, answers, strict=True):
            if not lives:
                done.lose(follower.replica_id, "it died")
        return [f for f, lives in zip(members, answers, strict=True) if lives]


async def _lives(follower: Follower) -> bool:
    """Whether the replica's process lives. Slow to answer counts as alive: only Ray says who is dead."""
    try:
        await wait(
            follower.actor.__ray_ready__.remote(),
            on=f"engine replica {follower.replica_id} to answer",
            seconds=PROBE_SECONDS,
        )
    except WaitTimeout:
        return True
    except ray.exceptions.RayActorError:
        return False
    return True


def _first_line(error: BaseException) -> str:
    return str(getattr(error, "cause", None) or error).strip().splitlines()[0]
