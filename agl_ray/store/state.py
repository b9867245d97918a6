"""The tables of the LightningStore: what is in memory of them, with indexes and counters that are kept as records change.

What it is: plain dictionaries behind `put_*`, which keep every index and counter true and note each changed record
until `drain` hands the changes to the journal. A rollout is in memory with all its attempts, or not at all; the queue, the
counters, workers and everything open are always there. What is not here is in the journal (`agl_ray.store.loading` brings it),
so a command runs only once all that it names is here. No rule lives here: those are in `lifecycle` and `machine`.
Who calls it: `agl_ray.store.lifecycle`, `agl_ray.store.machine`. Test alone: tests/unit/test_store_machine.py.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

from agl_ray.store.journals.base import AttemptKey as AttemptKey
from agl_ray.store.journals.base import BatchEntry as BatchEntry
from agl_ray.store.journals.base import Live, SpanTotals
from agl_ray.store.requests import Requests
from agl_ray.store.residents import Key, Residents
from agl_ray.types import (
    Attempt,
    EndReason,
    NotFound,
    ResourcesUpdate,
    Rollout,
    RolloutStatus,
    Worker,
    replace,
)

ROLLOUT_BYTES, ATTEMPT_BYTES, OTHER_BYTES = 700, 600, 400
"""What a record weighs in memory beside twice its JSON (measured: tests/unit/test_store_bounded.py)."""

SLACK_BYTES = 100  # by which JSON may grow (a status, a time) without being weighed again


class Change(NamedTuple):
    """One changed record for the journal. `position` orders the rows of a kind (queue place, sequence, update count)."""

    position: int
    record: Any  # a Record, or bytes for kind `state`
    created: int = 0  # of a rollout


class Group(NamedTuple):
    """A rollout as the journal holds it, with all that belongs to it."""

    rollout: Rollout
    created: int
    attempts: Sequence[Attempt]  # in order
    spans: Sequence[SpanTotals]
    body_bytes: tuple[int, int]  # JSON of the rollout, of its longest attempt


class Tally:
    """Numbers of one rollout in memory."""

    __slots__ = (
        "attempt_body",
        "created",
        "last_sequence",
        "num_open",
        "num_weighed",
        "rollout_body",
        "span_bytes",
    )

    def __init__(self, created: int) -> None:
        self.created = created  # ordinal among all rollouts
        self.last_sequence = 0  # of its spans
        self.span_bytes = 0
        self.num_open = 0  # attempts
        self.rollout_body = 0  # JSON bytes
        self.attempt_body = 0  # JSON bytes of the longest attempt
        self.num_weighed = 0  # attempts


class State:
    """The records of one store. `changes` maps (kind, key) to the newest version not yet handed to the journal.

    max_bytes: how much of what may leave memory stays there."""

    def __init__(self, max_bytes: int = 2**62) -> None:
        self.residents = Residents(max_bytes, self._stays)
        self.changes: dict[tuple[str, str], Change] = {}
        self.rollouts: dict[str, Rollout] = {}
        self.attempts: dict[str, dict[str, Attempt]] = {}  # in order of sequence
        self.tallies: dict[str, Tally] = {}
        self.resources: dict[str, ResourcesUpdate] = {}
        self.latest_resources_id: str | None = None
        self.workers: dict[str, Worker] = {}
        self.values: dict[str, bytes] = {}
        self.queue: OrderedDict[str, int] = OrderedDict()  # rollout id -> position
        self.open: dict[AttemptKey, None] = {}
        self.open_of_worker: dict[str, dict[AttemptKey, None]] = {}
        self.requests = Requests()
        self.batches: dict[AttemptKey, dict[str, BatchEntry]] = {}  # of open attempts
        self.position = 0
        self.last_created = 0
        self.rollouts_by_status: Counter[str] = Counter()
        self.rollouts_by_mode: Counter[tuple[str, str | None]] | None = Counter()  # (status, mode)
        self.attempts_by_reason: Counter[str] = Counter()  # ended ones
        self.num_attempts = 0
        self.num_resources = 0
        self.num_spans = 0
        self.span_bytes = 0

    # Reading. Unknown ids raise NotFound.

    def has(self, key: Key) -> bool:
        """Whether it is in memory."""
        kind, name = key
        if kind == "rollout":
            return name in self.rollouts
        return name in (self.resources if kind == "resources" else self.values)

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
        latest = self.latest_resources_id
        return None if latest is None else self.resources[latest]

    def first_waiting(self, number: int) -> list[str]:
        return list(islice(self.queue, number))

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
            self._count(before, -1)
        else:
            self.last_created += 1
            self.tallies[key] = Tally(self.last_created)
        self._count(rollout, 1)
        self.rollouts[key] = rollout
        if not rollout.status.waiting:
            self.queue.pop(key, None)
        elif key not in self.queue:
            self.queue[key] = self.next_position()
        created = self.tallies[key].created
        self._note("rollout", key, Change(self.queue.get(key, 0), rollout, created))
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
        self.residents.changed(("rollout", attempt.rollout_id))
        if durable:
            self.changes["attempt", "/".join(key)] = Change(attempt.sequence_id, attempt)
        return attempt

    def put_resources(self, update: ResourcesUpdate) -> ResourcesUpdate:
        """Store a snapshot; it becomes the latest."""
        before, key = self.latest_resources_id, update.resources_id
        self.num_resources += key not in self.resources
        self.resources[key] = update
        self.latest_resources_id = key
        self._note("resources", key, Change(self.next_position(), update))
        if before is not None:
            self.residents.settle(("resources", before))
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
        self._note("state", key, Change(0, value))

    def put_batch(
        self, key: AttemptKey, batch_id: str, count: int, size: int, first: int | None = None
    ) -> BatchEntry:
        """Give `count` spans the next sequence ids of their rollout, or those from `first` on."""
        tally = self.tallies[key[0]]
        entry = BatchEntry(tally.last_sequence + 1 if first is None else first, count)
        tally.last_sequence = max(tally.last_sequence, entry.first + count - 1)
        tally.span_bytes += size
        if key in self.open:
            self.batches.setdefault(key, {})[batch_id] = entry
        self.num_spans += count
        self.span_bytes += size
        self.residents.changed(("rollout", key[0]))
        return entry

    def forget(self, rollout_id: str) -> None:
        """Remove a rollout without open attempts, as if it had never been. The journal is told by the caller."""
        self._count(self.rollouts[rollout_id], -1)
        tries = self.attempts.get(rollout_id, {})
        for attempt in tries.values():
            self.attempts_by_reason[str(attempt.end_reason)] -= 1
            self.num_spans -= attempt.num_spans
        self.requests.forgotten(tries.values())
        self.num_attempts -= len(tries)
        self.span_bytes -= self.tallies[rollout_id].span_bytes
        self.residents.remove(("rollout", rollout_id))
        self._drop_rollout(rollout_id)

    def _count(self, rollout: Rollout, number: int) -> None:
        self.rollouts_by_status[rollout.status] += number
        if self.rollouts_by_mode is not None:
            self.rollouts_by_mode[rollout.status, rollout.mode] += number

    def _note(self, kind: str, key: str, change: Change) -> None:
        self.changes[kind, key] = change
        self.residents.changed((kind, key))

    def _open(self, key: AttemptKey, attempt: Attempt) -> None:
        self.open[key] = None
        self.tallies[key[0]].num_open += 1
        self._bind_worker(key, attempt)
        self.requests.began(attempt)

    def _close(self, key: AttemptKey, attempt: Attempt) -> None:
        if key in self.open:
            del self.open[key]
            self.tallies[key[0]].num_open -= 1
        self.batches.pop(key, None)
        self._forget_worker(key, attempt)
        self.requests.ended(attempt)

    def _bind_worker(self, key: AttemptKey, attempt: Attempt) -> None:
        if attempt.worker_id is not None and key in self.open:
            self.open_of_worker.setdefault(attempt.worker_id, {})[key] = None

    def _forget_worker(self, key: AttemptKey, attempt: Attempt) -> None:
        if attempt.worker_id in self.open_of_worker:
            self.open_of_worker[attempt.worker_id].pop(key, None)
            if not self.open_of_worker[attempt.worker_id]:
                del self.open_of_worker[attempt.worker_id]

    # Coming from the journal, and leaving memory.

    def restore(
        self,
        live: Live,
        groups: Sequence[Group],
        workers: Sequence[Worker],
        latest_resources: ResourcesUpdate | None,
    ) -> None:
        """Fill an empty state with what a journal needs in memory; nothing is noted as changed."""
        self.queue.update(live.waiting)
        self.position, self.last_created = live.last_position, live.last_created
        self.rollouts_by_status.update(live.rollouts_by_status)
        by_mode = live.rollouts_by_mode
        self.rollouts_by_mode = None if by_mode is None else Counter(by_mode)
        self.attempts_by_reason.update({k: n for k, n in live.attempts_by_reason.items() if k})
        self.num_attempts = sum(live.attempts_by_reason.values())
        self.num_resources = live.num_resources
        self.num_spans, self.span_bytes = live.num_spans, live.span_bytes
        self.workers.update((row.worker_id, row) for row in workers)
        if latest_resources is not None:
            self.latest_resources_id = latest_resources.resources_id
            self.admit_resources(latest_resources, 0)
        for group in groups:
            self.admit(group)
        for batch_id, key, entry in live.open_batches:
            self.batches.setdefault(key, {})[batch_id] = entry

    def admit(self, group: Group) -> None:
        """A rollout comes back from the journal."""
        rollout_id = group.rollout.rollout_id
        totals = {row.key[1]: row for row in group.spans}
        tally = self.tallies[rollout_id] = Tally(group.created)
        tally.rollout_body, tally.attempt_body = group.body_bytes
        tally.num_weighed = len(group.attempts)
        tally.last_sequence = max(
            group.rollout.reserved_spans, *(row.last for row in group.spans), 0
        )
        tally.span_bytes = sum(row.size for row in group.spans)
        self.rollouts[rollout_id] = group.rollout
        for attempt in group.attempts:
            key = (rollout_id, attempt.attempt_id)
            row = totals.get(attempt.attempt_id)
            attempt = replace(attempt, num_spans=row.number if row else 0)
            self.attempts.setdefault(rollout_id, {})[attempt.attempt_id] = attempt
            if attempt.end_reason is None:
                self._open(key, attempt)
        self._weigh_rollout(rollout_id)

    def admit_resources(self, update: ResourcesUpdate, body_bytes: int) -> None:
        self.resources[update.resources_id] = update
        self.residents.weigh(("resources", update.resources_id), OTHER_BYTES + 2 * body_bytes)

    def admit_value(self, key: str, value: bytes) -> None:
        self.values[key] = value
        self.residents.weigh(("state", key), OTHER_BYTES + len(value))

    def weigh(self, kind: str, key: str, record: Any, body_bytes: int) -> None:
        """`record` was written as so many bytes."""
        if kind == "rollout":
            tally = self.tallies.get(key)
            if tally is not None and body_bytes > tally.rollout_body:
                tally.rollout_body = body_bytes + SLACK_BYTES
                self._weigh_rollout(key)
        elif kind == "attempt":
            tally = self.tallies.get(record.rollout_id)
            if tally is None:
                return
            number = len(self.attempts.get(record.rollout_id, ()))
            if body_bytes > tally.attempt_body or number > tally.num_weighed:
                tally.attempt_body = max(tally.attempt_body, body_bytes + SLACK_BYTES)
                tally.num_weighed = number
                self._weigh_rollout(record.rollout_id)
        elif kind in ("resources", "state"):
            factor = 1 if kind == "state" else 2
            self.residents.weigh((kind, key), OTHER_BYTES + factor * body_bytes)

    def _weigh_rollout(self, rollout_id: str) -> None:
        tally = self.tallies[rollout_id]
        of_attempts = len(self.attempts.get(rollout_id, ())) * (
            ATTEMPT_BYTES + 2 * tally.attempt_body
        )
        weight = ROLLOUT_BYTES + 2 * tally.rollout_body + of_attempts
        self.residents.weigh(("rollout", rollout_id), weight)

    def _stays(self, key: Key) -> bool:
        if key[0] == "rollout":
            return self.tallies[key[1]].num_open > 0
        return key[0] == "resources" and key[1] == self.latest_resources_id

    def shrink(self) -> None:
        """Let go of what has to leave memory."""
        for kind, key in self.residents.leaving():
            if kind == "rollout":
                self._drop_rollout(key)
            elif kind == "resources":
                del self.resources[key]
            else:
                del self.values[key]

    def _drop_rollout(self, rollout_id: str) -> None:
        del self.rollouts[rollout_id], self.tallies[rollout_id]
        self.attempts.pop(rollout_id, None)

    def counts(self) -> dict[str, Any]:
        """The counters, as `LightningStore.statistics` reports them."""
        return {
            "rollouts": sum(self.rollouts_by_status.values()),
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
            "resources": self.num_resources,
            "workers": len(self.workers),
        }
