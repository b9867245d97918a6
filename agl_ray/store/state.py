"""The tables of the LightningStore, with indexes and counters that are kept as records change.

What it is: plain dictionaries behind `put_*`, which keep every index and counter true and note each changed record
until `drain` hands the changes to the journal. No rule lives here: those are in `lifecycle` and `machine`.
Who calls it: `agl_ray.store.lifecycle`, `agl_ray.store.machine`. Test alone: tests/unit/test_store_machine.py.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import Any, NamedTuple

from agl_ray.store.journals.base import AttemptKey as AttemptKey
from agl_ray.store.journals.base import BatchEntry as BatchEntry
from agl_ray.store.journals.base import SpanTotals
from agl_ray.types import (
    Attempt,
    Conflict,
    EndReason,
    NotFound,
    ResourcesUpdate,
    Rollout,
    RolloutStatus,
    Worker,
    replace,
)

REQUEST_ID = "request_id"
"""Key in `Attempt.metadata` of the dequeue or start call that made the attempt: a repeated call finds its attempts."""


class Change(NamedTuple):
    """One changed record for the journal. `position` orders the rows of a kind (queue place, sequence, update count)."""

    position: int
    record: Any  # a Record, or bytes for kind `state`
    created: int = 0  # of a rollout


class Snapshot(NamedTuple):
    """Everything that a journal holds, as `State.restore` takes it: rollouts in order of creation, the rest by position."""

    rollouts: list[tuple[int, int, Rollout]] = []  # created, position
    attempts: list[Attempt] = []
    resources: list[tuple[int, ResourcesUpdate]] = []
    workers: list[Worker] = []
    values: dict[str, bytes] = {}
    spans: list[SpanTotals] = []
    batches: list[tuple[str, AttemptKey, BatchEntry]] = []  # of open attempts
    starts: int = 1


class State:
    """All records of one store. `changes` maps (kind, key) to the newest version not yet handed to the journal."""

    def __init__(self) -> None:
        self.changes: dict[tuple[str, str], Change] = {}
        self.rollouts: dict[str, Rollout] = {}
        self.attempts: dict[str, dict[str, Attempt]] = {}  # in order of sequence
        self.resources: OrderedDict[str, ResourcesUpdate] = OrderedDict()  # latest last
        self.workers: dict[str, Worker] = {}
        self.values: dict[str, bytes] = {}
        self.queue: OrderedDict[str, int] = OrderedDict()  # rollout id -> position
        self.open: dict[AttemptKey, None] = {}
        self.open_of_worker: dict[str, dict[AttemptKey, None]] = {}
        self.requests: dict[str, list[AttemptKey]] = {}  # of open attempts
        self.batches: dict[AttemptKey, dict[str, BatchEntry]] = {}  # of open attempts
        self.last_sequence: dict[str, int] = {}
        self.created: dict[str, int] = {}
        self.position = 0
        self.rollouts_by_status: Counter[str] = Counter()
        self.attempts_by_reason: Counter[str] = Counter()
        self.num_attempts = 0
        self.num_spans = 0
        self.span_bytes = 0

    # Reading. Unknown ids raise NotFound.

    def rollout(self, rollout_id: str) -> Rollout:
        found = self.rollouts.get(rollout_id)
        if found is None:
            raise NotFound(f"rollout {rollout_id!r} is not in the store")
        return found

    def attempt(self, rollout_id: str, attempt_id: str) -> Attempt:
        """The attempt; `attempt_id` may be `latest`."""
        self.rollout(rollout_id)
        if attempt_id == "latest":
            latest = self.latest(rollout_id)
            if latest is None:
                raise NotFound(f"rollout {rollout_id!r} has no attempt yet")
            return latest
        found = self.attempts.get(rollout_id, {}).get(attempt_id)
        if found is None:
            raise NotFound(f"attempt {attempt_id!r} of rollout {rollout_id!r} is not in the store")
        return found

    def latest(self, rollout_id: str) -> Attempt | None:
        tries = self.attempts.get(rollout_id)
        return tries[next(reversed(tries))] if tries else None

    def is_latest(self, attempt: Attempt) -> bool:
        return next(reversed(self.attempts[attempt.rollout_id])) == attempt.attempt_id

    def latest_resources(self) -> ResourcesUpdate | None:
        return self.resources[next(reversed(self.resources))] if self.resources else None

    # Changing. Each keeps the indexes and counters, and notes the change.

    def drain(self) -> dict[tuple[str, str], Change]:
        """The changes since the last drain, newest version of each record."""
        changes, self.changes = self.changes, {}
        return changes

    def next_position(self) -> int:
        self.position += 1
        return self.position

    def put_rollout(self, rollout: Rollout) -> Rollout:
        """Store `rollout`; a status that waits puts it at the end of the queue (once), any other takes it out."""
        key = rollout.rollout_id
        before = self.rollouts.get(key)
        if before is not None:
            self.rollouts_by_status[before.status] -= 1
        else:
            self.created[key] = len(self.created) + 1
        self.rollouts_by_status[rollout.status] += 1
        self.rollouts[key] = rollout
        if not rollout.status.waiting:
            self.queue.pop(key, None)
        elif key not in self.queue:
            self.queue[key] = self.next_position()
        self.changes["rollout", key] = Change(self.queue.get(key, 0), rollout, self.created[key])
        return rollout

    def put_attempt(self, attempt: Attempt, *, durable: bool = True) -> Attempt:
        """Store `attempt`. `durable` False: only heartbeat or span count moved, which a restart rebuilds."""
        key = (attempt.rollout_id, attempt.attempt_id)
        tries = self.attempts.setdefault(attempt.rollout_id, {})
        before = tries.get(attempt.attempt_id)
        tries[attempt.attempt_id] = attempt
        if before is None:
            self.num_attempts += 1
            self._open(key, attempt)
        elif before.worker_id != attempt.worker_id:
            self._forget_worker(key, before)
            self._bind_worker(key, attempt)
        if attempt.end_reason is not None and (before is None or before.end_reason is None):
            self.attempts_by_reason[attempt.end_reason] += 1
            self._close(key, attempt)
        if durable:
            self.changes["attempt", "/".join(key)] = Change(attempt.sequence_id, attempt)
        return attempt

    def put_resources(self, update: ResourcesUpdate) -> ResourcesUpdate:
        """Store a snapshot; it becomes the latest."""
        self.resources[update.resources_id] = update
        self.resources.move_to_end(update.resources_id)
        self.changes["resources", update.resources_id] = Change(self.next_position(), update)
        return update

    def put_worker(self, worker: Worker) -> Worker:
        """Store `worker`. Its times and stats are telemetry: they reach the journal with its next change of status."""
        before = self.workers.get(worker.worker_id)
        self.workers[worker.worker_id] = worker
        if before is None or before.status != worker.status:
            self.changes["worker", worker.worker_id] = Change(0, worker)
        return worker

    def put_value(self, key: str, value: bytes) -> None:
        self.values[key] = value
        self.changes["state", key] = Change(0, value)

    def put_batch(self, key: AttemptKey, batch_id: str, count: int, size: int) -> BatchEntry:
        """Give `count` spans the next sequence ids of their rollout."""
        last = self.last_sequence.get(key[0], 0)
        entry = BatchEntry(last + 1, count)
        self.last_sequence[key[0]] = last + count
        if key in self.open:
            self.batches.setdefault(key, {})[batch_id] = entry
        self.num_spans += count
        self.span_bytes += size
        return entry

    def _open(self, key: AttemptKey, attempt: Attempt) -> None:
        self.open[key] = None
        self._bind_worker(key, attempt)
        request = attempt.metadata.get(REQUEST_ID)
        if request is not None:
            self.requests.setdefault(request, []).append(key)

    def _close(self, key: AttemptKey, attempt: Attempt) -> None:
        self.open.pop(key, None)
        self.batches.pop(key, None)
        self._forget_worker(key, attempt)
        request = attempt.metadata.get(REQUEST_ID)
        if request in self.requests:
            self.requests[request].remove(key)
            if not self.requests[request]:
                del self.requests[request]

    def _bind_worker(self, key: AttemptKey, attempt: Attempt) -> None:
        if attempt.worker_id is not None and key in self.open:
            self.open_of_worker.setdefault(attempt.worker_id, {})[key] = None

    def _forget_worker(self, key: AttemptKey, attempt: Attempt) -> None:
        if attempt.worker_id in self.open_of_worker:
            self.open_of_worker[attempt.worker_id].pop(key, None)
            if not self.open_of_worker[attempt.worker_id]:
                del self.open_of_worker[attempt.worker_id]

    # Restoring.

    def restore(self, snapshot: Snapshot) -> None:
        """Fill an empty state from a journal; nothing is noted as changed."""
        totals = {row.key: row for row in snapshot.spans}
        waiting: list[tuple[int, str]] = []
        for created, position, rollout in snapshot.rollouts:
            self.created[rollout.rollout_id] = created
            self.rollouts[rollout.rollout_id] = rollout
            self.rollouts_by_status[rollout.status] += 1
            if rollout.status.waiting:
                waiting.append((position, rollout.rollout_id))
        self.queue.update((key, position) for position, key in sorted(waiting))
        for attempt in snapshot.attempts:
            if attempt.rollout_id not in self.rollouts:
                raise Conflict(f"attempt {attempt.attempt_id!r} has no rollout in the journal")
            row = totals.get((attempt.rollout_id, attempt.attempt_id))
            self.put_attempt(replace(attempt, num_spans=row.number if row else 0), durable=False)
        for row in snapshot.spans:
            self.last_sequence[row.key[0]] = max(self.last_sequence.get(row.key[0], 0), row.last)
            self.num_spans += row.number
            self.span_bytes += row.size
        for batch_id, key, entry in snapshot.batches:
            if key in self.open:
                self.batches.setdefault(key, {})[batch_id] = entry
        self.resources.update((row.resources_id, row) for _, row in snapshot.resources)
        self.workers.update((row.worker_id, row) for row in snapshot.workers)
        self.values.update(snapshot.values)
        places = [*waiting, *((position, "") for position, _ in snapshot.resources)]
        self.position = max((position for position, _ in places), default=0)

    def counts(self) -> dict[str, Any]:
        """The counters, as `LightningStore.statistics` reports them."""
        return {
            "rollouts": len(self.rollouts),
            "rollouts_by_status": {
                status.value: self.rollouts_by_status[status] for status in RolloutStatus
            },
            "attempts": self.num_attempts,
            "attempts_open": len(self.open),
            "attempts_by_reason": {
                reason.value: self.attempts_by_reason[reason] for reason in EndReason
            },
            "queue": len(self.queue),
            "spans": self.num_spans,
            "span_bytes": self.span_bytes,
            "resources": len(self.resources),
            "workers": len(self.workers),
        }

    def in_order(self, rollout_ids: Iterable[str]) -> list[Rollout]:
        """The known ones among `rollout_ids`, in the given order."""
        return [self.rollouts[key] for key in rollout_ids if key in self.rollouts]
