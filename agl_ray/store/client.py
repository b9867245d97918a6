"""LightningStore: the one client of the store, for everybody.

What it is: async methods over a transport (the store actor, or a core of this process). Usable from any event loop, picklable
over the actor. While the actor restarts, calls are repeated with the same ids until `away_seconds`, so a repeated call does
nothing twice. Errors arrive as their own types: NotFound, Conflict, InputError, StoreError; WaitTimeout names what was waited for.
Who calls it: runners, gateway, controller, learner, tools. Test alone: tests/unit/test_store_client.py (`LightningStore.local`).
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import msgspec
import pyarrow as pa
from msgspec import UNSET, UnsetType

from agl_ray.store.checks import clean_text, json_value
from agl_ray.store.requests import request_id_of, rollout_id_of
from agl_ray.store.span_calls import SpanCalls, span_item
from agl_ray.store.state import AttemptKey
from agl_ray.types import (
    Attempt,
    AttemptedRollout,
    AttemptStatus,
    EndReason,
    EnqueueRolloutRequest,
    EventPage,
    NamedResources,
    NotFound,
    ResourcesUpdate,
    Rollout,
    RolloutConfig,
    RolloutStatus,
    StoreEvent,
    Worker,
    new_id,
)

STRAGGLER_SECONDS = 5.0  # the store's own patience with spans on their way
SLICE_SECONDS = 20.0  # one blocking call asks the actor for at most this long, then asks again


class LightningStore(SpanCalls):
    """Rollouts, attempts, spans, resources, workers and named state of one run. Made by `connect`, `local`, or
    `actors.store.create_store`; the parameters are those of `StoreCaller`."""

    # Resources.

    async def add_resources(self, resources: NamedResources) -> ResourcesUpdate:
        """Publish a new snapshot of named resources; it is the latest from now on."""
        return await self._call("add_resources", new_id("rs"), resources)

    async def update_resources(
        self, resources_id: str, resources: NamedResources
    ) -> ResourcesUpdate:
        """The next version of a snapshot (the first where the id is new); it becomes the latest."""
        again = (resources_id, resources, True)
        return await self._call("update_resources", resources_id, resources, repeat=again)

    # Rollouts.

    async def enqueue_rollout(
        self,
        input: Any,
        mode: str | None = None,
        resources_id: str | None = None,
        config: RolloutConfig | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> Rollout:
        """Queue one rollout. `input` and `metadata` are JSON values (InputError); `resources_id` None = the latest now."""
        request = EnqueueRolloutRequest(
            input=input,
            mode=mode,
            resources_id=resources_id,
            config=config,
            metadata=metadata or {},
        )
        return (await self.enqueue_many_rollouts([request]))[0]

    async def enqueue_many_rollouts(
        self, rollouts: Sequence[EnqueueRolloutRequest]
    ) -> list[Rollout]:
        """Queue all of them, in order, or none. A request with a `rollout_id` may be repeated without harm."""
        return await self._call("enqueue", [_ready(request) for request in rollouts])

    async def dequeue_rollout(
        self, worker_id: str | None = None, wait_seconds: float = 0.0
    ) -> AttemptedRollout | None:
        """Take the oldest waiting rollout and lease an attempt of it; None where none came within `wait_seconds`."""
        taken = await self.dequeue_many_rollouts(
            limit=1, worker_id=worker_id, wait_seconds=wait_seconds
        )
        return taken[0] if taken else None

    async def dequeue_many_rollouts(
        self,
        *,
        limit: int = 1,
        worker_id: str | None = None,
        wait_seconds: float = 0.0,
        request_id: str | None = None,
    ) -> list[AttemptedRollout]:
        """Up to `limit` leased attempts; waits up to `wait_seconds` for the first one, not for more.

        A `request_id` lets the caller repeat the call: what it took is given again, as it is now, and nothing more is taken. It is known
        while one of its attempts is open, and the newest 10,000 until the store restarts."""
        if limit < 1:
            return []
        request_id = request_id_of(request_id)
        give_up = time.monotonic() + wait_seconds
        slice_seconds, left = 0.0, wait_seconds  # the first look travels with other commands
        while True:
            taken = await self._call(
                "dequeue", limit, worker_id, slice_seconds, request_id, blocking=slice_seconds
            )
            if taken or left <= slice_seconds:
                return taken
            left = max(0.0, give_up - time.monotonic())
            slice_seconds = min(left, SLICE_SECONDS)

    async def start_rollout(
        self,
        input: Any,
        mode: str | None = None,
        resources_id: str | None = None,
        config: RolloutConfig | None = None,
        metadata: dict[str, Any] | None = None,
        worker_id: str | None = None,
        request_id: str | None = None,
    ) -> AttemptedRollout:
        """Make a rollout and its first attempt at once, past the queue. The same `request_id` again gives the same ones; with another
        `input` it is a Conflict."""
        request = EnqueueRolloutRequest(
            input=input,
            mode=mode,
            resources_id=resources_id,
            config=config,
            metadata=metadata or {},
            rollout_id=None if request_id is None else rollout_id_of(request_id),
        )
        request_id = request_id_of(request_id)
        return await self._call("start_rollout", _ready(request), worker_id, request_id)

    async def start_attempt(
        self, rollout_id: str, worker_id: str | None = None, request_id: str | None = None
    ) -> AttemptedRollout:
        """A new attempt by hand, past the queue and past `max_attempts`. Conflict where the rollout is final. The same `request_id` again
        gives the same attempt."""
        request_id = request_id_of(request_id)
        return await self._call("start_attempt", rollout_id, worker_id, request_id)

    async def cancel_rollouts(self, rollout_ids: Sequence[str]) -> list[Rollout]:
        """Cancel; open attempts end `cancelled`, final rollouts stay as they are."""
        return await self._call("cancel_rollouts", list(rollout_ids))

    async def forget_rollouts(self, rollout_ids: Sequence[str]) -> None:
        """Remove rollouts with their attempts and spans, for good. Unknown ones are left out; Conflict (and nothing removed)
        where one is not final: cancel it first."""
        await self._call("forget", list(rollout_ids))

    async def wait_for_rollouts(
        self,
        *,
        rollout_ids: Sequence[str],
        timeout: float | None = None,
        min_count: int | None = None,
    ) -> list[Rollout]:
        """The final ones, as soon as all (or `min_count`) are, or whoever is at `timeout` seconds (None = no limit).

        Ids that the store does not know are left out and not waited for.
        """
        ids = list(dict.fromkeys(rollout_ids))
        give_up = None if timeout is None else time.monotonic() + timeout
        while True:
            left = SLICE_SECONDS if give_up is None else max(0.0, give_up - time.monotonic())
            slice_seconds = min(left, SLICE_SECONDS)
            final, enough = await self._call(
                "wait_for_rollouts", ids, slice_seconds, min_count, blocking=slice_seconds
            )
            if enough or (give_up is not None and left <= SLICE_SECONDS):
                return final

    async def wait_for_queue(self, *, standing: float, timeout: float) -> int:
        """How many rollouts wait in the queue, as soon as it has not been empty for `standing` seconds, counted from this call: the
        takers are too few. 0 where that was not so within `timeout` seconds."""
        give_up = time.monotonic() + timeout
        while True:
            left = max(0.0, give_up - time.monotonic())
            slice_seconds = min(left, SLICE_SECONDS + standing)
            waiting: int = await self._call(
                "wait_for_queue", standing, slice_seconds, blocking=slice_seconds
            )
            if waiting or left <= slice_seconds:
                return waiting

    async def update_rollout(
        self,
        rollout_id: str,
        *,
        input: Any = UNSET,
        mode: str | UnsetType | None = UNSET,
        resources_id: str | UnsetType | None = UNSET,
        status: RolloutStatus | UnsetType = UNSET,
        config: RolloutConfig | UnsetType = UNSET,
        metadata: dict[str, Any] | UnsetType = UNSET,
    ) -> Rollout:
        """Change the given fields. Status by hand: see `agl_ray.store.edits`; queuing or requeuing revives a final rollout."""
        fields = {"input": input, "mode": mode, "resources_id": resources_id, "status": status}
        fields |= {"config": config, "metadata": metadata}
        return await self._call("update_rollout", rollout_id, _given(fields))

    # Attempts.

    async def end_attempt(
        self,
        rollout_id: str,
        attempt_id: str,
        reason: EndReason,
        *,
        reward: float | None = None,
        error: str | None = None,
        expected_spans: int | None = None,
        spans: pa.RecordBatch | bytes | None = None,
        batch_id: str | None = None,
    ) -> Attempt:
        """End an attempt; its rollout follows by the retry rule. Repeating the same end changes nothing.

        An attempt that ended `lost`, `timeout` or `cancelled` before is returned as it is: look at `end_reason`. Any other
        different end is a Conflict. `expected_spans`: how many spans were sent; an `ok` end waits some seconds for stragglers and
        becomes `lost` where they do not come. `spans`: the last ones, as `add_spans` takes them with its `batch_id`; they travel with the
        end and are in the journal when it is.
        """
        reason = EndReason(reason)
        given = (rollout_id, attempt_id, reason, reward, clean_text(error), expected_spans)
        item = None if spans is None else span_item(rollout_id, attempt_id, spans, batch_id)
        size = 0 if item is None else len(item.payload)
        # Where no span is missing the end travels with other commands; a wait for spans must not keep those waiting.
        ended = await self._call("end_attempt", *given, False, item, size=size)
        if ended is None:
            ended = await self._call("end_attempt", *given, True, item, blocking=STRAGGLER_SECONDS)
        return ended

    async def update_attempt(
        self,
        rollout_id: str,
        attempt_id: str,
        *,
        status: AttemptStatus | UnsetType = UNSET,
        worker_id: str | UnsetType | None = UNSET,
        last_heartbeat_time: float | UnsetType = UNSET,
        metadata: dict[str, Any] | UnsetType = UNSET,
    ) -> Attempt:
        """Change the given fields (`attempt_id` may be `latest`); a final status ends the attempt."""
        fields: dict[str, Any] = {"status": status, "worker_id": worker_id, "metadata": metadata}
        fields["last_heartbeat_time"] = last_heartbeat_time
        return await self._call("update_attempt", rollout_id, attempt_id, _given(fields))

    # Workers.

    async def update_worker(
        self,
        worker_id: str,
        heartbeat_stats: dict[str, Any] | UnsetType = UNSET,
        attempts: Iterable[AttemptKey] = (),
    ) -> Worker:
        """A heartbeat; it renews the leases of `attempts`."""
        return await self._call("update_worker", worker_id, heartbeat_stats, list(attempts))

    async def worker_lost(self, worker_id: str, why: str) -> list[Attempt]:
        """The worker is dead: end its open attempts `lost` (requeued by the retry rule) and return them."""
        return await self._call("worker_lost", worker_id, why)

    # Named state, statistics, life.

    async def put_state(self, key: str, value: bytes) -> None:
        """Keep `value` under `key` (the controller's position and the like)."""
        await self._call("put_state", key, value)

    async def get_state(self, key: str) -> bytes | None:
        return await self._call("get_state", key)

    async def list_state(self, prefix: str = "") -> list[str]:
        """The keys that start with `prefix`, sorted."""
        return await self._call("list_state", prefix)

    async def read_events(
        self, after: int = 0, *, limit: int = 1000, wait_seconds: float = 0.0
    ) -> EventPage:
        """Up to `limit` (at most 1000) changes of state with a number above `after`, in order; waits up to `wait_seconds` for the first.

        The newest 100,000 are kept: see `EventPage.oldest`."""
        # Who asks for none waits for none: the store answers at once, and asking again until the time is up would keep it busy.
        give_up = time.monotonic() + (wait_seconds if limit > 0 else 0.0)
        while True:
            left = max(0.0, give_up - time.monotonic())
            slice_seconds = min(left, SLICE_SECONDS)
            page: EventPage = await self._call(
                "read_events", after, limit, slice_seconds, blocking=slice_seconds
            )
            if page.events or left <= SLICE_SECONDS:
                return page

    async def events(self, after: int = 0) -> AsyncIterator[StoreEvent]:
        """Every change of state behind number `after`, as it happens, without end; 0 = from the beginning. A reader that is slow never slows
        the store. NotFound where some of what was asked for is not kept any more: it says from where on there are events."""
        while True:
            page = await self.read_events(after, wait_seconds=SLICE_SECONDS)
            if after + 1 < page.oldest and page.events:
                raise NotFound(
                    f"events {after + 1} to {page.oldest - 1} are not kept any more; ask for those after {page.oldest - 1}, and read what "
                    "the store holds now by its queries"
                )
            for event in page.events:
                yield event
            after = page.next

    async def ping(self) -> float:
        """Seconds that the store has been up (since its last restart)."""
        return await self._call("ping")

    async def shutdown(self) -> None:
        """Flush the journal and end the store's process."""
        await self._call("close")
        await self._transport.close()


def _ready(request: EnqueueRolloutRequest) -> EnqueueRolloutRequest:
    """With an id, and with JSON values as they will be read back."""
    return msgspec.structs.replace(
        request,
        rollout_id=request.rollout_id or new_id("ro"),
        input=json_value("input", request.input),
        metadata=json_value("metadata", request.metadata),
    )


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not UNSET}
