"""The rules of an attempt's life: how it begins, shows life, ends, and what its end does to its rollout.

What it is: pure functions over `State`; `now` is seconds since the epoch. The rules, in one place:

* only the latest attempt moves its rollout, and a final rollout is moved by nothing but an explicit requeue;
* `ok` -> succeeded; `cancelled` -> cancelled; another reason -> requeuing where `RolloutConfig.retry_condition` lists the
  attempt's status and `sequence_id < max_attempts`, else failed;
* the first `lost` of a rollout is requeued even where the configuration allows no retry: a process died, not the agent;
* a final attempt stays as it ended.

Who calls it: `agl_ray.store.machine`. Test alone: tests/unit/test_store_machine.py, tests/property/test_store_model.py.
"""

from __future__ import annotations

from agl_ray.store.requests import REQUEST_ID
from agl_ray.store.state import AttemptKey, State
from agl_ray.types import (
    Attempt,
    AttemptedRollout,
    AttemptStatus,
    EndReason,
    Rollout,
    RolloutStatus,
    Worker,
    new_id,
    replace,
)


def begin(
    state: State,
    rollout: Rollout,
    *,
    worker_id: str | None,
    request_id: str | None,
    lease_seconds: float,
    now: float,
) -> AttemptedRollout:
    """Make the next attempt of `rollout`, leased for `lease_seconds` (or the rollout's `unresponsive_seconds`)."""
    attempt_id = new_id("at")
    while attempt_id in state.attempts.get(rollout.rollout_id, {}):
        attempt_id = new_id("at")
    attempt = Attempt(
        rollout_id=rollout.rollout_id,
        attempt_id=attempt_id,
        sequence_id=rollout.num_attempts + 1,
        start_time=now,
        worker_id=worker_id,
        lease_until=now + lease_of(rollout, lease_seconds),
        metadata={} if request_id is None else {REQUEST_ID: request_id},
    )
    rollout = replace(
        rollout,
        status=RolloutStatus.PREPARING,
        num_attempts=attempt.sequence_id,
    )
    state.put_rollout(rollout)
    state.put_attempt(attempt)
    follow_worker(state, worker_id, now)
    return AttemptedRollout(rollout=rollout, attempt=attempt)


def lease_of(rollout: Rollout, lease_seconds: float) -> float:
    own = rollout.config.unresponsive_seconds
    return lease_seconds if own is None else own


def show_life(
    state: State, attempt: Attempt, lease_seconds: float, now: float, spans: int = 0
) -> Attempt:
    """A span or heartbeat came: renew the lease and let the attempt run. A final attempt only counts the spans."""
    if attempt.status.final:
        return state.put_attempt(
            replace(attempt, num_spans=attempt.num_spans + spans), durable=False
        )
    rollout = state.rollouts[attempt.rollout_id]
    started = attempt.status is AttemptStatus.PREPARING
    attempt = replace(
        attempt,
        status=AttemptStatus.RUNNING,
        last_heartbeat_time=now,
        lease_until=now + lease_of(rollout, lease_seconds),
        num_spans=attempt.num_spans + spans,
    )
    state.put_attempt(attempt, durable=started)
    if rollout.status is RolloutStatus.PREPARING and state.is_latest(attempt):
        state.put_rollout(replace(rollout, status=RolloutStatus.RUNNING))
    return attempt


def end(
    state: State,
    attempt: Attempt,
    reason: EndReason,
    *,
    now: float,
    reward: float | None = None,
    error: str | None = None,
) -> Attempt:
    """End an open attempt and let its rollout and worker follow."""
    ended = replace(
        attempt,
        status=reason.status,
        end_reason=reason,
        end_time=now,
        reward=reward if reason is EndReason.OK else None,
        error=error,
        lease_until=None,
    )
    state.put_attempt(ended)
    rollout = state.rollouts[attempt.rollout_id]
    if state.is_latest(ended) and not rollout.status.final and not rollout.status.waiting:
        status = status_after(state, rollout, ended)
        end_time = now if status.final else None
        state.put_rollout(replace(rollout, status=status, end_time=end_time))
    silent = reason in (EndReason.LOST, EndReason.TIMEOUT)
    follow_worker(state, ended.worker_id, now, idle="unknown" if silent else "idle")
    return ended


def status_after(state: State, rollout: Rollout, ended: Attempt) -> RolloutStatus:
    """Where the end of the latest attempt takes its rollout (the retry rule, see the module's docstring)."""
    if ended.end_reason is EndReason.OK:
        return RolloutStatus.SUCCEEDED
    if ended.end_reason is EndReason.CANCELLED:
        return RolloutStatus.CANCELLED
    config = rollout.config
    retried = {ended.status, ended.end_reason} & {*config.retry_condition}
    if retried and ended.sequence_id < config.max_attempts:
        return RolloutStatus.REQUEUING
    if ended.end_reason is EndReason.LOST:
        tries = state.attempts[rollout.rollout_id].values()
        if sum(one.end_reason is EndReason.LOST for one in tries) == 1:
            return RolloutStatus.REQUEUING
    return RolloutStatus.FAILED


def cancel(state: State, rollout: Rollout, now: float, why: str | None = None) -> Rollout:
    """Cancel a rollout and its open attempts; a final one stays as it is."""
    if rollout.status.final:
        return rollout
    cancelled = replace(rollout, status=RolloutStatus.CANCELLED, end_time=now)
    state.put_rollout(cancelled)
    close_attempts(state, rollout.rollout_id, now, why)
    return cancelled


def close_attempts(state: State, rollout_id: str, now: float, why: str | None) -> None:
    """End the open attempts of a rollout that has just become final."""
    for attempt in list(state.attempts.get(rollout_id, {}).values()):
        if not attempt.status.final:
            end(state, attempt, EndReason.CANCELLED, now=now, error=why)


def follow_worker(state: State, worker_id: str | None, now: float, idle: str = "idle") -> None:
    """Set the worker's status from its open attempts; without any it becomes `idle` (the parameter's word)."""
    if worker_id is None:
        return
    worker = state.workers.get(worker_id, Worker(worker_id=worker_id))
    current = open_attempt_of(state, worker_id)
    if current is not None:
        changed = replace(
            worker,
            status="busy",
            last_busy_time=now,
            current_rollout_id=current[0],
            current_attempt_id=current[1],
        )
    elif worker.status == "lost":
        changed = replace(worker, current_rollout_id=None, current_attempt_id=None)
    else:
        changed = replace(
            worker,
            status=idle,
            last_idle_time=now if idle == "idle" else worker.last_idle_time,
            current_rollout_id=None,
            current_attempt_id=None,
        )
    state.put_worker(changed)


def open_attempt_of(state: State, worker_id: str) -> AttemptKey | None:
    """The newest open attempt of a worker."""
    held = state.open_of_worker.get(worker_id)
    return next(reversed(held)) if held else None
