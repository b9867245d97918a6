"""Edits by hand: `update_rollout` and `update_attempt`, agent-lightning's doors into the state machine.

Rules (agent-lightning 0.3's, mended): fields change only where given, a status is propagated only where given, a final
rollout leaves its state only by an explicit requeue, which clears `end_time`.
Who calls it: `agl_ray.store.machine`. Test alone: tests/unit/test_store_machine.py.
"""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, UnsetType

from agl_ray.store import lifecycle
from agl_ray.store.checks import check_end, check_json, check_record, check_worker
from agl_ray.store.requests import REQUEST_ID
from agl_ray.store.state import State
from agl_ray.types import (
    Attempt,
    AttemptStatus,
    Conflict,
    EndReason,
    Rollout,
    RolloutStatus,
    replace,
)

REASON_OF = {
    AttemptStatus.SUCCEEDED: EndReason.OK,
    AttemptStatus.FAILED: EndReason.AGENT_ERROR,
    AttemptStatus.TIMEOUT: EndReason.TIMEOUT,
    AttemptStatus.UNRESPONSIVE: EndReason.LOST,
}


def update_rollout(
    state: State,
    rollout_id: str,
    fields: dict[str, Any],
    status: RolloutStatus | UnsetType,
    now: float,
) -> Rollout:
    rollout = state.rollout(rollout_id)
    given = {name: value for name, value in fields.items() if value is not UNSET}
    for name in ("input", "metadata"):
        check_json(name, given.get(name))
    target = rollout.status if isinstance(status, UnsetType) else RolloutStatus(status)
    check_status(state, rollout, target)
    if given:
        changed = replace(rollout, **given)
        check_record("update_rollout", changed)
        rollout = state.put_rollout(changed)
    return set_status(state, rollout, target, now)


def check_status(state: State, rollout: Rollout, status: RolloutStatus) -> None:
    """Conflict where `rollout` cannot be set to `status` by hand."""
    latest = state.latest(rollout.rollout_id)
    running = latest is not None and not latest.status.final
    if status is rollout.status:
        return
    if status.waiting and running:
        raise Conflict(
            f"rollout {rollout.rollout_id!r} has an open attempt: end that before setting it to {status}"
        )
    if rollout.status.final and not status.waiting:
        raise Conflict(
            f"rollout {rollout.rollout_id!r} is {rollout.status}, which is final: expected queuing or requeuing, got {status}"
        )
    if status in (RolloutStatus.PREPARING, RolloutStatus.RUNNING) and not running:
        raise Conflict(
            f"rollout {rollout.rollout_id!r} has no open attempt, so it cannot be {status}: use start_attempt"
        )


def set_status(state: State, rollout: Rollout, status: RolloutStatus, now: float) -> Rollout:
    """Set a checked status. Final: open attempts end `cancelled`. Waiting: to the end of the queue, `end_time` cleared."""
    if status is rollout.status:
        return rollout
    changed = state.put_rollout(
        replace(rollout, status=status, end_time=now if status.final else None)
    )
    if status.final:
        lifecycle.close_attempts(state, rollout.rollout_id, now, f"the rollout was set to {status}")
    return changed


def update_attempt(
    state: State,
    rollout_id: str,
    attempt_id: str,
    fields: dict[str, Any],
    lease_seconds: float,
    now: float,
) -> Attempt:
    """Change an attempt. A final status ends it (succeeded = ok, failed = agent_error, timeout, unresponsive = lost)."""
    attempt = state.attempt(rollout_id, attempt_id)
    given = {name: value for name, value in fields.items() if value is not UNSET}
    status = AttemptStatus(given.pop("status", attempt.status))
    check_json("metadata", given.get("metadata"))
    check_worker(given.get("worker_id"))
    check_attempt_status(attempt, status)
    if "metadata" in given:
        request = {key: attempt.metadata[key] for key in (REQUEST_ID,) if key in attempt.metadata}
        given["metadata"] = {**(given["metadata"] or {}), **request}
    if given:
        changed = replace(attempt, **given)
        check_record("update_attempt", changed)
        before, attempt = attempt, state.put_attempt(changed)
        for worker_id in {before.worker_id, attempt.worker_id} if "worker_id" in given else ():
            lifecycle.follow_worker(state, worker_id, now)
    if status is attempt.status or attempt.status.final:
        return attempt
    if status.final:
        return lifecycle.end(state, attempt, REASON_OF[status], now=now, reward=attempt.reward)
    return lifecycle.show_life(state, attempt, lease_seconds, now)


def check_attempt_status(attempt: Attempt, status: AttemptStatus) -> None:
    """Conflict where `attempt` cannot be set to `status` by hand."""
    if status is attempt.status:
        return
    if status.final:
        check_end(attempt, REASON_OF[status], attempt.reward)
    elif attempt.status.final or status is AttemptStatus.PREPARING:
        raise Conflict(
            f"attempt {attempt.attempt_id!r} of rollout {attempt.rollout_id!r} is {attempt.status} and cannot become {status}"
        )
