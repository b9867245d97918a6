"""Groups of rollouts, from a row to `ok` attempts with rewards: what the controller asks of store and runners.

Plain asyncio over the store's client; no actor of its own. Three askers: `preflight` (does the agent run at all?), `group`
(one slot of a training batch, refilled until enough of its members ended ok and, where the configuration says so, until their
rewards differ), `evaluate` (held-out rows). Test it alone with tests/unit/test_rollout_groups.py and tests/integration/test_runner_pool.py.
"""

from __future__ import annotations

import asyncio
import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from agl_ray.algorithms.base import without_signal
from agl_ray.config import RunConfig
from agl_ray.ops.ledger import Evaluation, RowResult
from agl_ray.schedule import Fate, Refill, RowOrder, RowPositions
from agl_ray.store import LightningStore
from agl_ray.trajectory.batch import GroupPlan, Member, TrainBatch
from agl_ray.types import (
    AgentFailure,
    Attempt,
    EndReason,
    EnqueueRolloutRequest,
    Rollout,
    RolloutConfig,
    RunError,
    WaitTimeout,
    new_id,
)

GRACE = 30.0  # seconds over the attempts' own deadlines before the controller gives a rollout up
# Not the agent's own errors: the same agent would fail on the same row again.
RETRY = (EndReason.ENGINE_ERROR, EndReason.ENV_ERROR, EndReason.TIMEOUT, EndReason.LOST)
PREFLIGHT_ROWS = 2


class GroupRollouts:
    """Enqueues rollouts and waits for their ends.

    positions: where the run is in its rows. weight_version(): the newest weights, for the agent to know. progress(done): called as rollouts of the
    current phase end. Consecutive dropped groups are bounded: when 3 x groups_per_step in a row are dropped, RunError says of what.
    """

    def __init__(
        self,
        config: RunConfig,
        store: LightningStore,
        train_rows: list[Any],
        resources_id: str,
        *,
        positions: RowPositions,
        weight_version: Callable[[], int] = lambda: 0,
    ) -> None:
        self.config, self.store, self.rows = config, store, train_rows
        self.resources_id, self._weight_version = resources_id, weight_version
        self.order = RowOrder(len(train_rows), config.seed, shuffle=config.data.shuffle)
        self.positions = positions
        self.refill = _refill(config)
        self.dropped_groups = 0
        self._dropped_in_a_row = 0

    def _request(self, row: Any, mode: str, metadata: dict[str, Any]) -> EnqueueRolloutRequest:
        settings = self.config.rollout
        sampling: dict[str, Any] = {
            "temperature": settings.temperature
            if mode == "train"
            else self.config.validation.temperature,
        }
        if settings.max_tokens is not None:
            sampling["max_tokens"] = settings.max_tokens
        if settings.seeded:
            sampling["seed"] = _seed(self.config.seed, mode, metadata)
        return EnqueueRolloutRequest(
            input=row,
            mode=mode,
            resources_id=self.resources_id,
            config=RolloutConfig(
                timeout_seconds=settings.timeout_seconds,
                unresponsive_seconds=self.config.runners.lease_seconds,
                max_attempts=settings.max_attempts,
                retry_condition=RETRY,
            ),
            metadata={
                **metadata,
                "weight_version": self._weight_version(),
                "sampling": sampling,
            },
            rollout_id=new_id("ro"),
        )

    async def _run(
        self, requests: list[EnqueueRolloutRequest]
    ) -> list[tuple[Rollout, Attempt | None]]:
        """Enqueue, wait until every rollout is final, and return each with its latest attempt, in order.

        Past the sum of the attempts' deadlines (runners busy with others count against it only through the queue, so the
        deadline is generous) what is still open is cancelled, and counts as a failure.
        """
        rollouts = await self.store.enqueue_many_rollouts(requests)
        ids = [rollout.rollout_id for rollout in rollouts]
        per_attempt = self.config.rollout.timeout_seconds + self.config.runners.lease_seconds
        runners = self.config.runners
        waves = 1 + self.config.rollouts_per_step // runners.capacity
        limit = per_attempt * self.config.rollout.max_attempts * waves + GRACE
        # A pool says itself what keeps its runners from starting.
        limit += max(pool.start_seconds for pool in runners.by_name.values())
        done = await self.store.wait_for_rollouts(rollout_ids=ids, timeout=limit)
        if len(done) < len(ids):
            missing = sorted(set(ids) - {rollout.rollout_id for rollout in done})
            await self.store.cancel_rollouts(missing)
            if not done:
                raise WaitTimeout(
                    f"{len(ids)} rollouts to end (first {ids[0]})",
                    limit,
                    "no runner ended any of them: are runners alive and free? see log.jsonl in the run folder",
                )
        attempts = await self.store.get_attempts(ids)
        by_id = {attempt.rollout_id: attempt for attempt in attempts}
        return [(rollout, by_id.get(rollout.rollout_id)) for rollout in rollouts]

    async def preflight(self) -> None:
        """Two single rollouts before anything long: AgentFailure with the agent's own error when both fail by it,
        RunError when both fail otherwise."""
        rows = self.rows[:PREFLIGHT_ROWS]
        ended = await self._run([self._request(row, "train", {"preflight": True}) for row in rows])
        attempts = [attempt for _, attempt in ended]
        failed = [a for a in attempts if a is None or a.end_reason is not EndReason.OK]
        if len(failed) < len(attempts):
            return
        last = failed[-1]
        reason = last.end_reason if last is not None else None
        error = last.error if last is not None else "no attempt was started"
        if reason is EndReason.AGENT_ERROR:
            raise AgentFailure(
                f"the agent failed on each of {len(failed)} trial rollouts, so nothing was trained: {error}. "
                "Mend the agent (run it alone on that row first) and start again."
            )
        raise RunError(f"each of {len(failed)} trial rollouts ended {reason}: {error}")

    async def group(self, step: int, progress: Callable[[int], None]) -> GroupPlan | None:
        """One group of a training batch: a row's rollouts whose attempts ended ok, at least `min_group` of them.

        A group with fewer is dropped and another row takes its place (counted); RunError when too many are dropped in a row. So it is with
        a group without signal where `algorithm.zero_signal` is refill; None when the further groups of the step are used up.
        """
        settings = self.config.rollout
        reasons: Counter[str] = Counter()
        while True:
            position = self.positions.take(step)
            row = self.rows[self.order.row(position)]
            requests = [
                self._request(row, "train", {"step": step, "row": position, "group_index": i})
                for i in range(settings.group_size)
            ]
            ended = await self._run(requests)
            members = tuple(_member(a) for _, a in ended if a is not None and _usable(a))
            if len(members) < settings.min_group:
                self._drop([a for _, a in ended if a is not None and not _usable(a)], reasons)
                continue
            self._dropped_in_a_row = 0
            fate = self._fate(step, [member.reward for member in members])
            if fate is Fate.AGAIN:
                continue
            progress(settings.group_size)
            if fate is Fate.SHORT:
                return None
            return GroupPlan(group_id=_group_id(step, position), members=members)

    def _drop(self, errors: list[Attempt], reasons: Counter[str]) -> None:
        """Count a group with too few members; reasons: end reasons so far of the slot's failed attempts."""
        settings = self.config.rollout
        self.dropped_groups += 1
        self._dropped_in_a_row += 1
        reasons.update(str(a.end_reason) for a in errors)
        if self._dropped_in_a_row >= 3 * settings.groups_per_step:
            raise RunError(
                f"{self._dropped_in_a_row} groups in a row had fewer than rollout.min_group ({settings.min_group}) "
                f"successful rollouts (end reasons: {dict(reasons)}); the last error was: {errors[-1].error if errors else None}"
            )

    def _fate(self, step: int, rewards: Sequence[float]) -> Fate:
        if self.refill is None:
            return Fate.TAKE
        signal = not without_signal(np.array(rewards), np.zeros(len(rewards), np.int64)).all()
        return self.refill.fate(step, rewards, signal=signal)

    def batch(self, step: int, slots: Sequence[GroupPlan | None]) -> TrainBatch:
        """The batch of `step` from its slots' groups; the rows that were taken for it are used up from now on.

        In the order of the rows: which slot a further row went to depends on which group ended first.
        """
        self.positions.settle(step)
        found = [group for group in slots if group is not None]
        return TrainBatch(
            step=step,
            groups=tuple(sorted(found, key=_position)),
            next_row=self.positions.next_row,
            open_rows=self.positions.open_rows,
            sampled=self.refill.settle(step) if self.refill else {},
        )

    async def evaluate(
        self, rows: list[Any], step: int, progress: Callable[[int], None]
    ) -> Evaluation:
        """Every row once, in mode val. Failures are counted by reason and are no zero among the rewards."""
        size = max(1, self.config.rollout.group_size * 4)
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]

        async def run_chunk(start: int, chunk: list[Any]) -> list[RowResult]:
            requests = [
                self._request(row, "val", {"step": step, "row": start * size + i})
                for i, row in enumerate(chunk)
            ]
            ended = await self._run(requests)
            progress(len(chunk))
            return [_result(rollout, attempt) for rollout, attempt in ended]

        nested = await asyncio.gather(*(run_chunk(i, chunk) for i, chunk in enumerate(chunks)))
        results = [result for chunk in nested for result in chunk]
        return Evaluation(step=step, results=results)


def _refill(config: RunConfig) -> Refill | None:
    if config.algorithm.zero_signal == "keep":
        return None
    return Refill(math.ceil(config.algorithm.refill_batches * config.rollout.groups_per_step))


def _group_id(step: int, position: int) -> str:
    return f"{step}-{position}"


def _position(group: GroupPlan) -> int:
    return int(group.group_id.partition("-")[2])


def _result(rollout: Rollout, attempt: Attempt | None) -> RowResult:
    usable = attempt is not None and _usable(attempt)
    return RowResult(
        rollout_id=rollout.rollout_id,
        attempt_id=attempt.attempt_id if attempt else None,
        reward=attempt.reward if attempt and usable else None,
        end_reason=str(attempt.end_reason) if attempt else "not_started",
    )


def _seed(run_seed: int, mode: str, metadata: dict[str, Any]) -> int:
    """A seed for a rollout's first call; its later calls count on from it. Equal for the same place in the same run."""
    place = [run_seed, mode, *(metadata.get(key) for key in ("step", "row", "group_index"))]
    return zlib.crc32(json.dumps(place).encode()) % 2**31


def _usable(attempt: Attempt) -> bool:
    """Only an `ok` attempt with a reward may enter an advantage or an average (contract 1)."""
    return attempt.end_reason is EndReason.OK and attempt.reward is not None


def _member(attempt: Attempt) -> Member:
    if attempt.reward is None:
        raise ValueError(f"attempt {attempt.attempt_id}: expected a reward, got None")
    return Member(
        rollout_id=attempt.rollout_id, attempt_id=attempt.attempt_id, reward=attempt.reward
    )
