"""Changes of state, as the LightningStore tells them to subscribers."""

from __future__ import annotations

from agl_ray.types.rollout import Record


class StoreEvent(Record, frozen=True):
    """One record has changed. `number` rises by one from event to event of a store, over its restarts too.

    kind: rollout, attempt, resources, worker or state. key: rollout id; `rollout_id/attempt_id`; resources id; worker id; key of the
    value. status: the record's status after the change (None for resources and state). end_reason, reward: of an attempt that ended.
    mode: of a rollout. version: of resources. time: seconds since the epoch.
    """

    number: int
    time: float
    kind: str
    key: str
    status: str | None = None
    end_reason: str | None = None
    reward: float | None = None
    mode: str | None = None
    version: int | None = None


class EventPage(Record, frozen=True):
    """Events in order. `next`: the cursor for the next call. `oldest`: the lowest number that is still kept; who asked for events after
    a lower number than `oldest - 1` has missed some."""

    events: tuple[StoreEvent, ...]
    next: int
    oldest: int
