"""What REST takes and gives: one msgspec struct per body, from which the OpenAPI document is made.

Who calls it: `agl_ray.store.doors.rest`. Test alone: tests/integration/test_store_rest.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from agl_ray.store import contract, span_filters
from agl_ray.types import (
    LLM,
    Attempt,
    AttemptedRollout,
    AttemptStatus,
    EndReason,
    EnqueueRolloutRequest,
    PaginatedResult,
    PromptTemplate,
    ResourcesUpdate,
    Rollout,
    RolloutConfig,
    RolloutStatus,
    Span,
    Worker,
)

T = TypeVar("T")

ID_PATTERN = r"^[A-Za-z0-9._:-]{1,128}$"
LONGEST_WAIT = 3600.0  # seconds of one long poll; ask again for more
MOST = 10_000  # records in one page or request

Id = Annotated[str, Meta(pattern=ID_PATTERN, max_length=128)]
Text = Annotated[str, Meta(pattern=r"^[^\x00]*$", max_length=1000)]
Mode = Literal["train", "val", "test"]
Limit = Annotated[int, Meta(ge=-1, le=2**31, description="-1: all")]
Offset = Annotated[int, Meta(ge=0, le=2**31)]
Seconds = Annotated[float, Meta(ge=0, le=LONGEST_WAIT)]
Logic = Literal["and", "or"]
Order = Literal["asc", "desc"]
Ids = Annotated[list[Id], Meta(max_length=MOST)]


def _one_of(names: Sequence[str]) -> Meta:
    """Told in the document; the store itself refuses others (400)."""
    return Meta(extra_json_schema={"enum": sorted(names)})


# What comes in.


class Body(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Base of request bodies: unknown fields are refused."""


class NewRollout(Body):
    """What is needed to queue a rollout. `rollout_id` makes a repeated request harmless."""

    input: Any
    mode: Mode | None = None
    resources_id: Id | None = None
    config: RolloutConfig | None = None
    metadata: dict[str, Any] | None = None
    rollout_id: Id | None = None

    def request(self) -> EnqueueRolloutRequest:
        return EnqueueRolloutRequest(
            input=self.input,
            mode=self.mode,
            resources_id=self.resources_id,
            config=self.config,
            metadata=self.metadata or {},
            rollout_id=self.rollout_id,
        )


class Enqueue(Body):
    """Rollouts to queue, in order: all of them or none."""

    rollouts: Annotated[list[NewRollout], Meta(max_length=MOST)]


RequestId = Annotated[
    str,
    Meta(
        pattern=ID_PATTERN,
        max_length=128,
        description="Chosen by the caller, fresh for each request: when that is sent again, its answer is given again and nothing is "
        "done twice.",
    ),
]


class Dequeue(Body):
    """Up to `limit` rollouts; waits up to `wait_seconds` for the first one."""

    request_id: RequestId | None = None
    limit: Annotated[int, Meta(ge=0, le=MOST)] = 1
    worker_id: Id | None = None
    wait_seconds: Seconds = 0.0


class StartRollout(Body):
    """A rollout whose first attempt begins at once, past the queue."""

    input: Any
    mode: Mode | None = None
    resources_id: Id | None = None
    config: RolloutConfig | None = None
    metadata: dict[str, Any] | None = None
    worker_id: Id | None = None
    request_id: RequestId | None = None


class UpdateRollout(Body):
    """The fields to change; those that are not given stay."""

    input: Any = UNSET
    mode: Mode | UnsetType | None = UNSET
    resources_id: Id | UnsetType | None = UNSET
    status: RolloutStatus | UnsetType = UNSET
    config: RolloutConfig | UnsetType = UNSET
    metadata: dict[str, Any] | UnsetType = UNSET


class StartAttempt(Body):
    worker_id: Id | None = None
    request_id: RequestId | None = None


class UpdateAttempt(Body):
    """The fields to change; those that are not given stay. A final status ends the attempt."""

    status: AttemptStatus | UnsetType = UNSET
    worker_id: Id | UnsetType | None = UNSET
    last_heartbeat_time: float | UnsetType = UNSET
    metadata: dict[str, Any] | UnsetType = UNSET


class EndAttempt(Body):
    """expected_spans: how many spans were sent; an `ok` end waits for stragglers and becomes `lost` where they do not come."""

    reason: EndReason
    reward: float | None = None
    error: str | None = None
    expected_spans: Annotated[int, Meta(ge=0, le=2**62)] | None = None


class CancelRollouts(Body):
    rollout_ids: Ids


class UpdateWorker(Body):
    """A heartbeat. attempts: (rollout id, attempt id) pairs whose leases it renews."""

    heartbeat_stats: dict[str, Any] | UnsetType = UNSET
    attempts: Annotated[list[tuple[Id, Id]], Meta(max_length=MOST)] = []


class Resources(Body):
    """Named resources: endpoints and prompt templates."""

    resources: dict[str, LLM | PromptTemplate]


class WaitForRollouts(Body):
    """Answered when all of these (or `min_count`) are final, or after `timeout` seconds with those that are."""

    rollout_ids: Ids
    timeout: Seconds | None = None
    min_count: Annotated[int, Meta(ge=0, le=MOST)] | None = None


class Events(Body):
    """Changes of state with a number above `after`, in order; waits up to `wait_seconds` for the first."""

    after: Annotated[int, Meta(ge=0, le=2**53)] = 0
    limit: Annotated[int, Meta(ge=0, le=1000)] = 1000
    wait_seconds: Seconds = 0.0


class NextSequenceId(Body):
    rollout_id: Id
    attempt_id: Id


Moment = Annotated[float, Meta(ge=0, le=9e9, description="seconds since the epoch")]


class NewSpan(Span, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A span to store; see Span."""

    rollout_id: Id
    attempt_id: Id
    span_id: Id | None = None
    sequence_id: Annotated[int, Meta(ge=1, le=2**53)] | None = None
    kind: Literal["call", "reward", "span"] = "span"
    status: Literal["UNSET", "OK", "ERROR"] = "UNSET"
    start_time: Moment | None = None
    end_time: Moment | None = None


class Paging(Body):
    """limit: records at most, -1 = all. cursor: `next_cursor` of the page before, with the other fields as they were then."""

    limit: Limit = 100
    offset: Offset = 0
    sort_order: Order = "asc"
    cursor: Text | None = None


class SearchRollouts(Paging):
    status_in: list[RolloutStatus] | None = None
    rollout_id_in: list[Text] | None = None
    rollout_id_contains: Text | None = None
    mode: Mode | None = None
    filter_logic: Logic = "and"
    sort_by: Annotated[str, _one_of([*contract.ROLLOUT_SORTS])] | None = None


class SearchAttempts(Paging):
    sort_by: Annotated[str, _one_of([*contract.ATTEMPT_SORTS])] = "sequence_id"


class SearchWorkers(Paging):
    status_in: list[Literal["idle", "busy", "unknown", "lost"]] | None = None
    worker_id_contains: Text | None = None
    filter_logic: Logic = "and"
    sort_by: Annotated[str, _one_of([*contract.WORKER_SORTS])] | None = None


class SearchResources(Paging):
    resources_id: Text | None = None
    resources_id_contains: Text | None = None
    sort_by: Annotated[str, _one_of([*contract.RESOURCES_SORTS])] | None = None


class SearchSpans(Paging, kw_only=True):
    """attempt_id: of one attempt only; `latest` is the newest."""

    rollout_id: Id
    attempt_id: Id | None = None
    trace_id: Text | None = None
    trace_id_contains: Text | None = None
    span_id: Text | None = None
    span_id_contains: Text | None = None
    parent_id: Text | None = None
    parent_id_contains: Text | None = None
    name: Text | None = None
    name_contains: Text | None = None
    filter_logic: Logic = "and"
    sort_by: Annotated[str, _one_of([*span_filters.SORTS])] = "sequence_id"


# What goes out.


class RolloutWithAttempt(Rollout, frozen=True, kw_only=True):
    """A rollout, and an attempt of it: the one just made, or (in lists) its latest."""

    attempt: Attempt | None = None


class RolloutPage(msgspec.Struct):
    items: list[RolloutWithAttempt]
    limit: int
    offset: int
    total: int
    next_cursor: str | None


class AttemptPage(msgspec.Struct):
    items: list[Attempt]
    limit: int
    offset: int
    total: int
    next_cursor: str | None


class WorkerPage(msgspec.Struct):
    items: list[Worker]
    limit: int
    offset: int
    total: int
    next_cursor: str | None


class ResourcesPage(msgspec.Struct):
    items: list[ResourcesUpdate]
    limit: int
    offset: int
    total: int
    next_cursor: str | None


class SpanPage(msgspec.Struct):
    items: list[Span]
    limit: int
    offset: int
    total: int
    next_cursor: str | None


class Health(msgspec.Struct):
    """uptime_seconds: since the store's last start."""

    status: Literal["ok"]
    uptime_seconds: float


class ErrorFacts(msgspec.Struct):
    """type: NotFound, Conflict, InputError, StoreError, WaitTimeout, ...; message: a sentence for people."""

    type: str
    message: str


class Error(msgspec.Struct):
    error: ErrorFacts


def with_attempt(one: Rollout | AttemptedRollout) -> RolloutWithAttempt:
    rollout = one.rollout if isinstance(one, AttemptedRollout) else one
    attempt = one.attempt if isinstance(one, AttemptedRollout) else None
    return RolloutWithAttempt(**msgspec.structs.asdict(rollout), attempt=attempt)


def page(found: PaginatedResult[Any], items: Sequence[Any], next_cursor: str | None) -> Any:
    """The body of a list; its struct for the document is the `...Page` of its kind."""
    return {
        "items": items,
        "limit": found.limit,
        "offset": found.offset,
        "total": found.total,
        "next_cursor": next_cursor,
    }
