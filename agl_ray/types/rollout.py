"""Rollouts, attempts, workers: the records of the LightningStore.

Frozen msgspec structs: typed, comparable, picklable, and JSON both ways (`to_json`, `from_json`) without code of ours.
Times are seconds since the epoch. Change a record with `replace(record, field=value)`.
"""

from __future__ import annotations

import secrets
from enum import StrEnum
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")
MODES = ("train", "val", "test")
replace = msgspec.structs.replace


class RolloutStatus(StrEnum):
    """Where a rollout is. `SUCCEEDED`, `FAILED` and `CANCELLED` are final."""

    QUEUING = "queuing"  # waits for its first attempt
    PREPARING = "preparing"  # leased, nothing heard from the attempt yet
    RUNNING = "running"  # the attempt has sent a span or a heartbeat
    REQUEUING = "requeuing"  # waits for another attempt
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self in (RolloutStatus.SUCCEEDED, RolloutStatus.FAILED, RolloutStatus.CANCELLED)

    @property
    def waiting(self) -> bool:
        return self in (RolloutStatus.QUEUING, RolloutStatus.REQUEUING)


class AttemptStatus(StrEnum):
    """Where an attempt is (agent-lightning's names). All but the first two are final."""

    PREPARING = "preparing"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMEOUT = "timeout"
    UNRESPONSIVE = "unresponsive"

    @property
    def final(self) -> bool:
        return self not in (AttemptStatus.PREPARING, AttemptStatus.RUNNING)


class EndReason(StrEnum):
    """Why an attempt ended. Only `OK` may enter an advantage (contract 1)."""

    OK = "ok"  # the agent finished and its reward is known
    AGENT_ERROR = "agent_error"  # the agent raised, or returned something that is no finite reward
    ENV_ERROR = "env_error"  # the agent's environment (a tool, a sandbox) failed: raise agl_ray.EnvironmentFailure
    ENGINE_ERROR = "engine_error"  # a model call could not be answered
    TIMEOUT = "timeout"  # the deadline of the attempt passed
    CANCELLED = "cancelled"  # somebody cancelled the rollout
    LOST = "lost"  # the process that ran it died or fell silent

    @property
    def status(self) -> AttemptStatus:
        """The attempt status, in agent-lightning's words, that this reason leads to."""
        return _STATUS_OF[self]


_STATUS_OF = {
    EndReason.OK: AttemptStatus.SUCCEEDED,
    EndReason.AGENT_ERROR: AttemptStatus.FAILED,
    EndReason.ENV_ERROR: AttemptStatus.FAILED,
    EndReason.ENGINE_ERROR: AttemptStatus.FAILED,
    EndReason.CANCELLED: AttemptStatus.FAILED,
    EndReason.TIMEOUT: AttemptStatus.TIMEOUT,
    EndReason.LOST: AttemptStatus.UNRESPONSIVE,
}


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all records."""


UNANSWERED_CALL = "unanswered_call"
"""Key in `Attempt.metadata`: why the attempt's last model call got no answer; no such key once a later call was answered.
An agent that goes on without the answer would end `ok` with a reward that means nothing, so the store ends it `engine_error`."""


class RolloutConfig(Record, frozen=True):
    """Limits of one rollout.

    timeout_seconds: deadline of one attempt, from its start; None = the pool's.
    unresponsive_seconds: an attempt without span or heartbeat for this long is `lost`; None = the store's lease.
    max_attempts: attempts at most, the first one included (>= 1).
    retry_condition: attempt statuses (agent-lightning's, such as `failed`) or end reasons (`engine_error`) after which another
    attempt is made.
    """

    timeout_seconds: float | None = None
    unresponsive_seconds: float | None = None
    max_attempts: int = 1
    retry_condition: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(
                f"RolloutConfig.max_attempts: expected 1 or more, got {self.max_attempts}"
            )
        known = {*AttemptStatus, *EndReason}
        for condition in self.retry_condition:
            if condition not in known:
                raise ValueError(
                    f"RolloutConfig.retry_condition: expected some of {sorted(known)}, got {condition!r}"
                )


class Rollout(Record, frozen=True):
    """One task given to the agent. `input` and `metadata` are JSON values; `mode` is one of MODES or None.

    reserved_spans: the highest span number that was handed out ahead of its span.
    """

    rollout_id: str
    input: Any
    start_time: float
    end_time: float | None = None
    mode: str | None = None
    resources_id: str | None = None
    status: RolloutStatus = RolloutStatus.QUEUING
    config: RolloutConfig = RolloutConfig()
    metadata: dict[str, Any] = {}
    num_attempts: int = 0
    reserved_spans: int = 0


class Attempt(Record, frozen=True):
    """One try at a rollout. `sequence_id` counts from 1; `lease_until` is when it is taken for lost unless renewed.

    `num_spans` is what the store holds; `reward` is the primary reward of an `ok` attempt (None where the reward comes
    later, from a judge); `error` is one paragraph for people.
    """

    rollout_id: str
    attempt_id: str
    sequence_id: int
    start_time: float
    end_time: float | None = None
    status: AttemptStatus = AttemptStatus.PREPARING
    end_reason: EndReason | None = None
    error: str | None = None
    reward: float | None = None
    worker_id: str | None = None
    last_heartbeat_time: float | None = None
    lease_until: float | None = None
    num_spans: int = 0
    metadata: dict[str, Any] = {}


class AttemptedRollout(Record, frozen=True):
    """A rollout with an attempt of it: the one just made, or (in lists) its latest. It has the fields of its rollout, too."""

    rollout: Rollout
    attempt: Attempt

    def __post_init__(self) -> None:
        if self.rollout.rollout_id != self.attempt.rollout_id:
            raise ValueError(
                f"AttemptedRollout.attempt: expected one of rollout {self.rollout.rollout_id!r}, got one of "
                f"{self.attempt.rollout_id!r}"
            )

    @property
    def rollout_id(self) -> str:
        return self.rollout.rollout_id

    @property
    def attempt_id(self) -> str:
        return self.attempt.attempt_id

    @property
    def input(self) -> Any:
        return self.rollout.input

    @property
    def start_time(self) -> float:
        return self.rollout.start_time

    @property
    def end_time(self) -> float | None:
        return self.rollout.end_time

    @property
    def mode(self) -> str | None:
        return self.rollout.mode

    @property
    def resources_id(self) -> str | None:
        return self.rollout.resources_id

    @property
    def status(self) -> RolloutStatus:
        return self.rollout.status

    @property
    def config(self) -> RolloutConfig:
        return self.rollout.config

    @property
    def metadata(self) -> dict[str, Any]:
        return self.rollout.metadata

    @property
    def num_attempts(self) -> int:
        return self.rollout.num_attempts


class EnqueueRolloutRequest(Record, frozen=True):
    """What is needed to queue a rollout. `rollout_id` given by the caller makes a repeated call harmless."""

    input: Any
    mode: str | None = None
    resources_id: str | None = None
    config: RolloutConfig | None = None
    metadata: dict[str, Any] = {}
    rollout_id: str | None = None


class Worker(Record, frozen=True):
    """A process that runs attempts."""

    worker_id: str
    status: str = "unknown"  # idle | busy | unknown | lost
    heartbeat_stats: dict[str, Any] | None = None
    last_heartbeat_time: float | None = None
    last_dequeue_time: float | None = None
    last_busy_time: float | None = None
    last_idle_time: float | None = None
    current_rollout_id: str | None = None
    current_attempt_id: str | None = None


def new_id(prefix: str) -> str:
    """A fresh id: `ro-` and `rs-` with 12 hex digits, `at-` with 8, anything else with 12."""
    return f"{prefix}-{secrets.token_hex(4 if prefix == 'at' else 6)}"


def to_json(record: Any) -> bytes:
    """JSON bytes of a record (or list of records)."""
    return msgspec.json.encode(record)


def from_json(body: bytes | str, kind: type[T]) -> T:
    """The record of type `kind` in `body`; msgspec.ValidationError names the field that does not fit."""
    return msgspec.json.decode(body, type=kind)
