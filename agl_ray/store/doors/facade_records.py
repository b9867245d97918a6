"""Rollouts in agent-lightning 1.0's words: its records on the wire, its states, and how both are kept in ours.

What it is: 1.0 knows four states; of ours queuing and requeuing are `queuing`, preparing and running `running`, failed and cancelled
`failed`. What its rollouts have and ours have not (local and k8s configuration, job name, the patch counter) rests in the
rollout's metadata under `KEPT`, which the wire does not show. Its attempts are all called "0": that names the latest attempt here.
Who calls it: `agl_ray.store.doors.facade`. Test alone: tests/unit/test_store_facade.py.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from agl_ray.types import (
    Attempt,
    AttemptedRollout,
    EnqueueRolloutRequest,
    InputError,
    Rollout,
    RolloutConfig,
    RolloutStatus,
)

KEPT = "agentlightning-1.0"
"""Key in a rollout's metadata of what only 1.0 knows; also the worker id of attempts that its clients began."""

FIRST = "0"  # the attempt id that 1.0's controllers hand out
LONG_SECONDS = (
    7 * 86400.0
)  # lease of an attempt without a time limit: 1.0's agents send no heartbeats


class State(StrEnum):
    """1.0's states of a rollout."""

    QUEUING = "queuing"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


STATE_OF = {
    RolloutStatus.QUEUING: State.QUEUING,
    RolloutStatus.REQUEUING: State.QUEUING,
    RolloutStatus.PREPARING: State.RUNNING,
    RolloutStatus.RUNNING: State.RUNNING,
    RolloutStatus.SUCCEEDED: State.SUCCEEDED,
    RolloutStatus.FAILED: State.FAILED,
    RolloutStatus.CANCELLED: State.FAILED,
}
NEXT = {
    State.QUEUING: (State.RUNNING, State.FAILED),
    State.RUNNING: (State.SUCCEEDED, State.FAILED),
    State.SUCCEEDED: (),
    State.FAILED: (),
}
"""Which state may follow which by a PATCH."""


class Local(msgspec.Struct):
    agent_class: str | None = None
    env_map: dict[str, str] = {}


class K8s(msgspec.Struct):
    job_template: str | None = None


class Config(msgspec.Struct):
    timeout_seconds: int = 3600
    local: Local | None = None
    k8s: K8s | None = None


class RolloutCreate(msgspec.Struct):
    """One item of POST /api/rollouts."""

    input: Any
    is_train: bool = True
    config: Config | None = None
    metadata: dict[str, Any] | None = None
    rollout_id: str | None = None


class StatusPatch(msgspec.Struct, forbid_unknown_fields=True):
    state: State | UnsetType = UNSET
    k8s_job_name: str | UnsetType | None = UNSET
    last_attempt_id: str | UnsetType | None = UNSET
    error_message: str | UnsetType | None = UNSET


class RolloutPatch(msgspec.Struct, forbid_unknown_fields=True):
    """Body of PATCH /api/rollouts/{id}."""

    status: StatusPatch | None = None


class Status(msgspec.Struct):
    state: State
    k8s_job_name: str | None
    last_attempt_id: str | None
    error_message: str | None
    version: int
    created_at: float
    updated_at: float


class WireRollout(msgspec.Struct):
    rollout_id: str
    input: Any
    is_train: bool
    config: Config
    metadata: dict[str, Any]
    status: Status


class Terminal(msgspec.Struct):
    """One item of GET /api/rollouts/terminal."""

    rollout_id: str
    state: State
    data_id: str
    is_train: bool


def request_of(item: RolloutCreate) -> EnqueueRolloutRequest:
    """What the store is asked for. The lease is the time limit, for 1.0's agents send no heartbeats."""
    config = item.config or Config()
    if config.timeout_seconds < 0:
        raise InputError(
            f"config.timeout_seconds: expected 0 (no limit) or more, got {config.timeout_seconds}"
        )
    metadata = dict(item.metadata or {})
    if KEPT in metadata:
        raise InputError(f"metadata: the key {KEPT!r} is the store's own; choose another")
    metadata[KEPT] = msgspec.to_builtins({"local": config.local, "k8s": config.k8s})
    return EnqueueRolloutRequest(
        input=item.input,
        mode="train" if item.is_train else "val",
        config=RolloutConfig(
            timeout_seconds=config.timeout_seconds or None,
            unresponsive_seconds=config.timeout_seconds or LONG_SECONDS,
        ),
        metadata=metadata,
        rollout_id=item.rollout_id,
    )


def wire_rollout(found: Rollout | AttemptedRollout) -> WireRollout:
    """A rollout, with its latest attempt where it has one, as 1.0 shows it."""
    rollout = found.rollout if isinstance(found, AttemptedRollout) else found
    attempt = found.attempt if isinstance(found, AttemptedRollout) else None
    kept = kept_of(rollout)
    times = [rollout.start_time, rollout.end_time, kept.get("updated_at")]
    times += [attempt.start_time, attempt.end_time] if attempt else []
    state = STATE_OF[rollout.status]
    error = attempt.error if attempt and state is State.FAILED else None
    return WireRollout(
        rollout_id=rollout.rollout_id,
        input=rollout.input,
        is_train=is_train(rollout),
        config=Config(
            timeout_seconds=round(rollout.config.timeout_seconds or 0),
            local=msgspec.convert(kept.get("local"), Local | None),
            k8s=msgspec.convert(kept.get("k8s"), K8s | None),
        ),
        metadata={"batch_idx": None, "sample_idx_in_batch": None}
        | {key: value for key, value in rollout.metadata.items() if key != KEPT},
        status=Status(
            state=state,
            k8s_job_name=kept.get("k8s_job_name"),
            last_attempt_id=kept.get("last_attempt_id")
            or (wire_attempt(attempt) if attempt else None),
            error_message=kept.get("error_message") or error,
            version=kept.get("version", 1),
            created_at=rollout.start_time,
            updated_at=max(one for one in times if one is not None),
        ),
    )


def kept_of(rollout: Rollout) -> dict[str, Any]:
    return rollout.metadata.get(KEPT) or {}


def patched(rollout: Rollout, patch: StatusPatch, now: float) -> dict[str, Any]:
    """The rollout's metadata after a patch, whose state is the store's own business."""
    given = msgspec.to_builtins(patch)
    announced = given.pop("state", None) == State.RUNNING
    kept = kept_of(rollout) | given
    kept |= {"version": kept.get("version", 1) + 1, "updated_at": now}
    if announced:
        kept["announced"] = True
    return {**rollout.metadata, KEPT: kept}


def is_train(rollout: Rollout) -> bool:
    return rollout.mode in ("train", None)


def wire_attempt(attempt: Attempt) -> str:
    """The id of an attempt on the wire: an attempt that a client of 1.0 began is "0" there."""
    return FIRST if attempt.worker_id == KEPT else attempt.attempt_id


def terminal_of(rollout: Rollout) -> Terminal:
    """`data_id`: of the input, where it is an object that has one (or an `instance_id`)."""
    given = rollout.input if isinstance(rollout.input, dict) else {}
    data_id = given.get("data_id") or given.get("instance_id") or ""
    return Terminal(
        rollout_id=rollout.rollout_id,
        state=STATE_OF[rollout.status],
        data_id=str(data_id),
        is_train=is_train(rollout),
    )
