"""Records and errors shared by every room. No behaviour, no heavy import."""

from msgspec import UNSET

from agl_ray.types.errors import (
    AgentFailure,
    AglError,
    ConfigError,
    Conflict,
    EngineError,
    InputError,
    NotFound,
    RunError,
    StoreError,
    WaitTimeout,
    WeightSyncError,
)
from agl_ray.types.event import EventPage, StoreEvent
from agl_ray.types.page import PaginatedResult
from agl_ray.types.resource import LLM, NamedResources, PromptTemplate, Resource, ResourcesUpdate
from agl_ray.types.rollout import (
    UNANSWERED_CALL,
    Attempt,
    AttemptedRollout,
    AttemptStatus,
    EndReason,
    EnqueueRolloutRequest,
    Record,
    Rollout,
    RolloutConfig,
    RolloutStatus,
    Worker,
    from_json,
    new_id,
    replace,
    to_json,
)
from agl_ray.types.span import Span

__all__ = [
    "LLM",
    "UNANSWERED_CALL",
    "UNSET",
    "AgentFailure",
    "AglError",
    "Attempt",
    "AttemptStatus",
    "AttemptedRollout",
    "ConfigError",
    "Conflict",
    "EndReason",
    "EngineError",
    "EnqueueRolloutRequest",
    "EventPage",
    "InputError",
    "NamedResources",
    "NotFound",
    "PaginatedResult",
    "PromptTemplate",
    "Record",
    "Resource",
    "ResourcesUpdate",
    "Rollout",
    "RolloutConfig",
    "RolloutStatus",
    "RunError",
    "Span",
    "StoreError",
    "StoreEvent",
    "WaitTimeout",
    "WeightSyncError",
    "Worker",
    "from_json",
    "new_id",
    "replace",
    "to_json",
]
