"""The LightningStore as a pure, synchronous state machine: command in, records changed out.

What it is: one method per command. `now` (seconds since the epoch) is passed in; nothing here waits, reads a clock or touches a
disk. What a command names is in memory already where the store has it at all. A command either raises before anything changed, or applies whole; `state.drain()` then gives the changed records
for the journal. Commands that a client may repeat after a lost answer carry an id made by the client (rollout id, request id,
batch id, resources id) and answer a repetition as they answered the first call.
Who calls it: `agl_ray.store.core`. Test alone: tests/unit/test_store_machine.py, tests/property/test_store_model.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from msgspec import UNSET, UnsetType

from agl_ray.store import edits, lifecycle
from agl_ray.store.checks import (
    check_dictionary,
    check_end,
    check_id,
    check_json,
    check_record,
    check_text,
    check_worker,
    clean_text,
)
from agl_ray.store.journals.base import AttemptKey, Live
from agl_ray.store.numbers import SpanNumbers
from agl_ray.store.requests import REQUEST_ID
from agl_ray.store.state import Group, State
from agl_ray.types import (
    UNANSWERED_CALL,
    Attempt,
    AttemptedRollout,
    Conflict,
    EndReason,
    EnqueueRolloutRequest,
    InputError,
    NamedResources,
    NotFound,
    ResourcesUpdate,
    Rollout,
    RolloutStatus,
    Worker,
    new_id,
    replace,
)


class Machine(SpanNumbers):
    """lease_seconds: an attempt that shows no life for this long is `lost`.
    grace_seconds: how long past its own deadline an attempt may be before the store ends it `timeout`.
    max_bytes: how much of what is final or waits may stay in memory; None = all."""

    def __init__(
        self,
        *,
        lease_seconds: float = 30.0,
        grace_seconds: float = 5.0,
        max_bytes: int | None = None,
    ) -> None:
        self.lease_seconds = lease_seconds
        self.grace_seconds = grace_seconds
        self.state = State() if max_bytes is None else State(max_bytes)

    def restore(
        self,
        live: Live,
        groups: Sequence[Group],
        workers: Sequence[Worker],
        latest_resources: ResourcesUpdate | None,
        now: float,
    ) -> None:
        """Take over a journal; `groups`: the rollouts with open attempts. Those get a fresh lease, so that living runners
        go on."""
        self.state.restore(live, groups, workers, latest_resources)
        for batch_id, key, entry in live.open_batches:
            self.name_spans(key, batch_id, entry)
        self.renew_all(now)

    def renew_all(self, now: float) -> None:
        """Renew the lease of every open attempt: the store itself was deaf for a while."""
        for rollout_id, attempt_id in self.state.open:
            attempt = self.state.attempts[rollout_id][attempt_id]
            seconds = lifecycle.lease_of(self.state.rollouts[rollout_id], self.lease_seconds)
            self.state.put_attempt(replace(attempt, lease_until=now + seconds), durable=False)

    # Resources.

    def add_resources(
        self, resources_id: str, resources: NamedResources, now: float
    ) -> ResourcesUpdate:
        """A new snapshot, the latest from now on. The same id with the same content is a repeated call."""
        known = self.state.resources.get(resources_id)
        if known is not None:
            if known.resources == resources:
                return known
            raise Conflict(
                f"resources {resources_id!r} exist with other content: use update_resources"
            )
        return self.update_resources(resources_id, resources, now)

    def update_resources(
        self, resources_id: str, resources: NamedResources, now: float, *, repeated: bool = False
    ) -> ResourcesUpdate:
        """The next version of a snapshot (the first where the id is new); it becomes the latest."""
        check_id("resources_id", resources_id)
        check_json("resources", resources)
        known = self.state.resources.get(resources_id)
        if repeated and known is not None and known.resources == resources:
            return known
        update = ResourcesUpdate(
            resources_id=resources_id,
            create_time=now if known is None else known.create_time,
            update_time=now,
            version=1 if known is None else known.version + 1,
            resources=resources,
        )
        check_record("resources", update)
        return self.state.put_resources(update)

    def put_value(self, key: str, value: bytes, now: float) -> None:
        """Keep `value` (bytes, as they are) under `key`."""
        del now
        check_text("state key", key)
        if not isinstance(value, bytes):
            raise InputError(f"state {key!r}: expected bytes, got {type(value).__name__}")
        self.state.put_value(key, value)

    # Rollouts and the queue.

    def enqueue(self, requests: Sequence[EnqueueRolloutRequest], now: float) -> list[Rollout]:
        """Queue all or none. A request whose id is known and whose input is the same is a repeated call."""
        made = [self._rollout_of(request, now) for request in requests]
        return [
            self.state.rollouts.get(rollout.rollout_id) or self.state.put_rollout(rollout)
            for rollout in made
        ]

    def _rollout_of(self, request: EnqueueRolloutRequest, now: float) -> Rollout:
        rollout_id = request.rollout_id or new_id("ro")
        check_id("rollout_id", rollout_id)
        known = self.state.rollouts.get(rollout_id)
        if known is not None:
            if known.input != request.input:
                raise Conflict(
                    f"rollout {rollout_id!r} exists with another input: choose a fresh id"
                )
            return known
        check_text("mode", request.mode)
        check_json("input", request.input)
        check_dictionary("metadata", request.metadata)
        resources_id = request.resources_id
        latest = self.state.latest_resources()
        if resources_id is None:
            resources_id = latest.resources_id if latest is not None else None
        elif resources_id not in self.state.resources:
            raise NotFound(
                f"resources_id {resources_id!r}: not in the store; add_resources comes first"
            )
        fields: dict[str, Any] = {}
        if request.config is not None:
            check_record("config", request.config)
            fields["config"] = request.config
        return Rollout(
            rollout_id=rollout_id,
            input=request.input,
            start_time=now,
            mode=request.mode,
            resources_id=resources_id,
            metadata=request.metadata,
            **fields,
        )

    def dequeue(
        self, *, limit: int, worker_id: str | None, request_id: str | None, now: float
    ) -> list[AttemptedRollout]:
        """Take up to `limit` rollouts, first in first out, and make their attempts: one step.

        A repeated call (same `request_id`) gets the attempts of the first one, as they are now, and no others: see
        `agl_ray.store.requests` for how long it is known.
        """
        again = self._made_by(request_id)
        if again:
            return again
        check_worker(worker_id)
        taken: list[AttemptedRollout] = []
        while len(taken) < limit and self.state.queue:
            rollout_id, _ = self.state.queue.popitem(last=False)
            taken.append(self._begin(self.state.rollouts[rollout_id], worker_id, request_id, now))
        if worker_id is not None:
            lifecycle.follow_worker(self.state, worker_id, now)
            worker = self.state.workers[worker_id]
            self.state.put_worker(replace(worker, last_dequeue_time=now))
        return taken

    def start_rollout(
        self, request: EnqueueRolloutRequest, worker_id: str | None, request_id: str, now: float
    ) -> AttemptedRollout:
        """Make a rollout and its first attempt at once, past the queue."""
        again = self._made_by(request_id) or self._made_in(request.rollout_id, request_id)
        if again:
            if again[0].rollout.input != request.input:
                raise _used(request_id)
            return again[0]
        check_worker(worker_id)
        if request.rollout_id in self.state.rollouts:
            raise Conflict(f"rollout {request.rollout_id!r} exists: use start_attempt")
        return self._begin(self._rollout_of(request, now), worker_id, request_id, now)

    def start_attempt(
        self, rollout_id: str, worker_id: str | None, request_id: str, now: float
    ) -> AttemptedRollout:
        """A new attempt by hand, past the queue and past `max_attempts`; a final rollout refuses (Conflict)."""
        again = self._made_by(request_id) or self._made_in(rollout_id, request_id)
        if again:
            if again[0].rollout_id != rollout_id:
                raise _used(request_id)
            return again[0]
        check_worker(worker_id)
        rollout = self.state.rollout(rollout_id)
        if rollout.status.final:
            raise Conflict(
                f"rollout {rollout_id!r} is {rollout.status}: requeue it (update_rollout status) before a new attempt"
            )
        return self._begin(rollout, worker_id, request_id, now)

    def _begin(
        self, rollout: Rollout, worker_id: str | None, request_id: str | None, now: float
    ) -> AttemptedRollout:
        return lifecycle.begin(
            self.state,
            rollout,
            worker_id=worker_id,
            request_id=request_id,
            lease_seconds=self.lease_seconds,
            now=now,
        )

    def _made_by(self, request_id: str | None) -> list[AttemptedRollout]:
        return [
            AttemptedRollout(
                rollout=self.state.rollouts[key[0]], attempt=self.state.attempts[key[0]][key[1]]
            )
            for key in self.state.requests.made_by(request_id)
        ]

    def _made_in(self, rollout_id: str | None, request_id: str) -> list[AttemptedRollout]:
        """The attempt of this rollout that the request made, if it did."""
        if rollout_id is None:
            return []
        return [
            AttemptedRollout(rollout=self.state.rollouts[rollout_id], attempt=attempt)
            for attempt in self.state.attempts.get(rollout_id, {}).values()
            if attempt.metadata.get(REQUEST_ID) == request_id
        ]

    def cancel_rollouts(self, rollout_ids: Sequence[str], now: float) -> list[Rollout]:
        """Cancel; final ones stay as they are. NotFound (and nothing changed) where one is unknown."""
        rollouts = [self.state.rollout(rollout_id) for rollout_id in rollout_ids]
        return [
            lifecycle.cancel(self.state, rollout, now, "the rollout was cancelled")
            for rollout in rollouts
        ]

    def update_rollout(
        self,
        rollout_id: str,
        now: float,
        *,
        input: Any = UNSET,
        mode: str | UnsetType | None = UNSET,
        resources_id: str | UnsetType | None = UNSET,
        status: RolloutStatus | UnsetType = UNSET,
        config: Any = UNSET,
        metadata: Any = UNSET,
    ) -> Rollout:
        """Change the given fields; a status goes by the rules of `agl_ray.store.edits.set_status`."""
        if not isinstance(mode, UnsetType):
            check_text("mode", mode)
        if resources_id not in (UNSET, None) and resources_id not in self.state.resources:
            raise NotFound(f"resources_id {resources_id!r}: not in the store")
        fields = {"input": input, "mode": mode, "resources_id": resources_id}
        fields |= {"config": config, "metadata": metadata}
        return edits.update_rollout(self.state, rollout_id, fields, status, now)

    # Attempts.

    def end_attempt(
        self,
        rollout_id: str,
        attempt_id: str,
        reason: EndReason,
        *,
        now: float,
        reward: float | None = None,
        error: str | None = None,
    ) -> Attempt:
        """End an attempt; the same end again changes nothing.

        An attempt whose last model call got no answer ends `engine_error`, whatever its agent made of that. An attempt that ended `lost`, `timeout` or `cancelled` is returned as it is; another different end is a Conflict.
        """
        attempt = self.state.attempt(rollout_id, attempt_id)
        unanswered = attempt.metadata.get(UNANSWERED_CALL)
        if unanswered and reason in (EndReason.OK, EndReason.AGENT_ERROR):
            reason, reward, error = EndReason.ENGINE_ERROR, None, unanswered
        check_end(attempt, reason, reward)
        if attempt.status.final:
            return attempt
        return lifecycle.end(
            self.state, attempt, reason, now=now, reward=reward, error=clean_text(error)
        )

    def update_attempt(
        self, rollout_id: str, attempt_id: str, now: float, **fields: Any
    ) -> Attempt:
        """Change `status`, `worker_id`, `last_heartbeat_time`, `metadata` where given (`attempt_id` may be `latest`)."""
        return edits.update_attempt(
            self.state, rollout_id, attempt_id, fields, self.lease_seconds, now
        )

    # Workers.

    def update_worker(
        self,
        worker_id: str,
        now: float,
        *,
        heartbeat_stats: dict[str, Any] | UnsetType = UNSET,
        attempts: Iterable[AttemptKey] = (),
    ) -> Worker:
        """A heartbeat: it renews the leases of `attempts` (those that are open; others are left as they ended)."""
        check_id("worker_id", worker_id)
        if not isinstance(heartbeat_stats, UnsetType):
            check_dictionary("heartbeat_stats", heartbeat_stats)
        for rollout_id, attempt_id in attempts:
            if (rollout_id, attempt_id) in self.state.open:
                attempt = self.state.attempts[rollout_id][attempt_id]
                lifecycle.show_life(self.state, attempt, self.lease_seconds, now)
        worker = self.state.workers.get(worker_id, Worker(worker_id=worker_id))
        if worker.status == "lost":
            held = worker_id in self.state.open_of_worker
            worker = replace(worker, status="busy" if held else "unknown")
        if not isinstance(heartbeat_stats, UnsetType):
            worker = replace(worker, heartbeat_stats=heartbeat_stats)
        return self.state.put_worker(replace(worker, last_heartbeat_time=now))

    def worker_lost(self, worker_id: str, why: str, now: float) -> list[Attempt]:
        """The worker's process is dead: its open attempts end `lost`, and go back to the queue where the rule allows."""
        keys = list(self.state.open_of_worker.get(worker_id, {}))
        ended = [self._end_over_head(key, EndReason.LOST, why, now) for key in keys]
        if worker_id in self.state.workers:
            self.state.put_worker(replace(self.state.workers[worker_id], status="lost"))
        return ended

    def tick(self, now: float) -> list[Attempt]:
        """End what is past its deadline (`timeout`) or past its lease (`lost`)."""
        ended = []
        for key in list(self.state.open):
            attempt = self.state.attempts[key[0]][key[1]]
            limit = self.state.rollouts[key[0]].config.timeout_seconds
            if limit is not None and now > attempt.start_time + limit + self.grace_seconds:
                why = f"the attempt ran longer than its limit of {limit:g} s"
                ended.append(self._end_over_head(key, EndReason.TIMEOUT, why, now))
            elif attempt.lease_until is not None and now > attempt.lease_until:
                why = f"worker {attempt.worker_id} sent no sign of life until its lease ran out"
                ended.append(self._end_over_head(key, EndReason.LOST, why, now))
        return ended

    def _end_over_head(self, key: AttemptKey, reason: EndReason, why: str, now: float) -> Attempt:
        attempt = self.state.attempts[key[0]][key[1]]
        return lifecycle.end(self.state, attempt, reason, now=now, error=why)

    def forget(self, rollout_ids: Iterable[str], now: float) -> list[str]:
        """Remove final rollouts with all that belongs to them, and give the ids of those that were there. Conflict (and nothing
        is removed) where one is not final or has an open attempt."""
        del now
        known = [one for one in dict.fromkeys(rollout_ids) if one in self.state.rollouts]
        for rollout_id in known:
            status = self.state.rollouts[rollout_id].status
            if not status.final:
                raise Conflict(
                    f"rollout {rollout_id!r} is {status}: only final rollouts can be forgotten"
                )
            if self.state.tallies[rollout_id].num_open:
                raise Conflict(
                    f"rollout {rollout_id!r} has an open attempt: end that before it is forgotten"
                )
        for rollout_id in known:
            self.state.forget(rollout_id)
        return known


def _used(request_id: str) -> Conflict:
    return Conflict(
        f"request_id {request_id!r} was used for another rollout: choose a fresh one for each request"
    )
