"""The state machine against a simple model, under any order of commands, with restarts from what it reported as changed."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agl_ray.store.machine import Machine
from agl_ray.store.state import Snapshot, SpanTotals
from agl_ray.types import (
    AttemptStatus,
    Conflict,
    EndReason,
    EnqueueRolloutRequest,
    RolloutConfig,
    RolloutStatus,
    from_json,
    to_json,
)

LEASE = 30.0
WORKERS = ("w1", "w2")
RETRYABLE = (AttemptStatus.FAILED, AttemptStatus.TIMEOUT, AttemptStatus.UNRESPONSIVE)


class Model:
    """What a person would write on paper about one rollout."""

    def __init__(self, config: RolloutConfig) -> None:
        self.config = config
        self.attempts: list[dict[str, Any]] = []
        self.waiting = True
        self.final: str | None = None

    def ended(self, reason: EndReason) -> bool:
        """The latest attempt ended; True when the rollout goes back to the queue."""
        if reason is EndReason.OK:
            self.final = "succeeded"
        elif reason is EndReason.CANCELLED:
            self.final = "cancelled"
        else:
            again = (
                reason.status in self.config.retry_condition
                and len(self.attempts) < self.config.max_attempts
            )
            losses = [one for one in self.attempts if one["reason"] is EndReason.LOST]
            if again or (reason is EndReason.LOST and len(losses) == 1):
                self.waiting = True
                return True
            self.final = "failed"
        return False


class StoreMachine(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.machine = Machine(lease_seconds=LEASE)
        self.now = 1000.0
        self.models: dict[str, Model] = {}
        self.queue: list[str] = []
        self.journal: dict[tuple[str, str], Any] = {}
        self.batches: dict[tuple[str, str], dict[str, tuple[int, int]]] = {}
        self.requests: dict[str, list[tuple[str, str]]] = {}
        self.counter = 0

    def fresh(self, prefix: str) -> str:
        self.counter += 1
        return f"{prefix}-{self.counter}"

    def keep(self) -> None:
        """What the journal would hold now."""
        for name, (place, record, _) in self.machine.state.drain().items():
            self.journal[name] = (place, record)

    def open_keys(self) -> list[tuple[str, str]]:
        return [
            (name, one["id"])
            for name, model in self.models.items()
            for one in model.attempts
            if one["reason"] is None
        ]

    def every_key(self) -> list[tuple[str, str]]:
        return [(n, one["id"]) for n, model in self.models.items() for one in model.attempts]

    def note_end(self, key: tuple[str, str], reason: EndReason) -> None:
        model = self.models[key[0]]
        one = next(one for one in model.attempts if one["id"] == key[1])
        one["reason"] = reason
        if one is model.attempts[-1] and model.final is None and model.ended(reason):
            self.queue.append(key[0])

    def note_begin(self, taken: Any, worker: str | None) -> None:
        model = self.models[taken.rollout_id]
        model.waiting = False
        assert taken.attempt.sequence_id == len(model.attempts) + 1
        model.attempts.append(
            {
                "id": taken.attempt_id,
                "reason": None,
                "worker": worker,
                "alive": self.now,
                "since": self.now,
            }
        )

    @rule(
        number=st.integers(1, 3),
        max_attempts=st.integers(1, 3),
        condition=st.sets(st.sampled_from(RETRYABLE)),
        timeout=st.sampled_from([None, 60.0]),
    )
    def enqueue(
        self, number: int, max_attempts: int, condition: set, timeout: float | None
    ) -> None:
        config = RolloutConfig(
            max_attempts=max_attempts, retry_condition=tuple(condition), timeout_seconds=timeout
        )
        names = [self.fresh("ro") for _ in range(number)]
        requests = [
            EnqueueRolloutRequest(input=name, rollout_id=name, config=config) for name in names
        ]
        first = self.machine.enqueue(requests, self.now)
        assert self.machine.enqueue(requests, self.now + 1) == first
        for name in names:
            self.models[name] = Model(config)
            self.queue.append(name)
        self.keep()

    @rule(limit=st.integers(1, 3), worker=st.sampled_from([*WORKERS, None]), repeat=st.booleans())
    def dequeue(self, limit: int, worker: str | None, repeat: bool) -> None:
        request = self.fresh("rq")
        taken = self.machine.dequeue(
            limit=limit, worker_id=worker, request_id=request, now=self.now
        )
        expected, self.queue = self.queue[:limit], self.queue[limit:]
        assert [one.rollout_id for one in taken] == expected
        for one in taken:
            self.note_begin(one, worker)
        if repeat and taken:
            again = self.machine.dequeue(
                limit=limit, worker_id=worker, request_id=request, now=self.now
            )
            assert [one.attempt_id for one in again] == [one.attempt_id for one in taken]
        self.keep()

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def start_attempt(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.models)))
        try:
            taken = self.machine.start_attempt(name, "w1", self.fresh("rq"), self.now)
        except Conflict:
            assert self.models[name].final is not None
            return
        assert self.models[name].final is None
        self.queue = [one for one in self.queue if one != name]
        self.note_begin(taken, "w1")
        self.keep()

    @precondition(lambda self: self.every_key())
    @rule(data=st.data(), reason=st.sampled_from(EndReason))
    def end(self, data: st.DataObject, reason: EndReason) -> None:
        key = data.draw(st.sampled_from(self.every_key()))
        before = next(one for one in self.models[key[0]].attempts if one["id"] == key[1])["reason"]
        late = (EndReason.LOST, EndReason.TIMEOUT, EndReason.CANCELLED)
        try:
            ended = self.machine.end_attempt(*key, reason, now=self.now, reward=1.0)
        except Conflict:
            assert before is not None
            assert before is not reason
            assert before not in late
            return
        assert before in (None, reason, *late)
        assert ended.end_reason is (reason if before is None else before)
        if before is None:
            self.note_end(key, reason)
        self.keep()

    @precondition(lambda self: self.every_key())
    @rule(data=st.data(), number=st.integers(1, 4), repeat=st.booleans())
    def add_spans(self, data: st.DataObject, number: int, repeat: bool) -> None:
        key = data.draw(st.sampled_from(self.every_key()))
        batch = self.fresh("ba")
        total = sum(
            n for k, kept in self.batches.items() if k[0] == key[0] for _, n in kept.values()
        )
        entry = self.machine.add_spans(key, batch, number, 10, self.now)
        assert tuple(entry) == (total + 1, number)
        self.batches.setdefault(key, {})[batch] = (entry.first, number)
        one = next(one for one in self.models[key[0]].attempts if one["id"] == key[1])
        if one["reason"] is None:
            one["alive"] = self.now
            if repeat:
                assert self.machine.known_batch(key, batch) == entry
        self.keep()

    @rule(worker=st.sampled_from(WORKERS))
    def heartbeat(self, worker: str) -> None:
        mine = [key for key in self.open_keys() if self.of(key)["worker"] == worker]
        self.machine.update_worker(worker, self.now, attempts=[*mine, ("ro-x", "at-x")])
        for key in mine:
            self.of(key)["alive"] = self.now
        self.keep()

    def of(self, key: tuple[str, str]) -> dict[str, Any]:
        return next(one for one in self.models[key[0]].attempts if one["id"] == key[1])

    @rule(worker=st.sampled_from(WORKERS))
    def worker_lost(self, worker: str) -> None:
        mine = [key for key in self.open_keys() if self.of(key)["worker"] == worker]
        lost = self.machine.worker_lost(worker, "killed", self.now)
        order = [(one.rollout_id, one.attempt_id) for one in lost]
        assert sorted(order) == sorted(mine)
        for key in order:
            self.note_end(key, EndReason.LOST)
        self.keep()

    @rule(seconds=st.sampled_from([0.1, 20.0, 31.0, 70.0]))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        ended = self.machine.tick(self.now)
        expected = {}
        for key in self.open_keys():
            limit = self.models[key[0]].config.timeout_seconds
            if limit is not None and self.now > self.of(key)["since"] + limit + 5.0:
                expected[key] = EndReason.TIMEOUT
            elif self.now > self.of(key)["alive"] + LEASE:
                expected[key] = EndReason.LOST
        assert {(one.rollout_id, one.attempt_id): one.end_reason for one in ended} == expected
        for one in ended:
            assert one.end_reason is not None
            self.note_end((one.rollout_id, one.attempt_id), one.end_reason)
        self.keep()

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.models)))
        self.machine.cancel_rollouts([name], self.now)
        model = self.models[name]
        if model.final is None:
            model.final = "cancelled"
            self.queue = [one for one in self.queue if one != name]
            for one in model.attempts:
                one["reason"] = one["reason"] or EndReason.CANCELLED
        self.keep()

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def requeue(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.models)))
        model = self.models[name]
        waits = name in self.queue
        open_latest = bool(model.attempts) and model.attempts[-1]["reason"] is None
        try:
            self.machine.update_rollout(name, self.now, status=RolloutStatus.REQUEUING)
        except Conflict:
            assert open_latest
            return
        assert not open_latest
        model.final = None
        if not waits:
            self.queue.append(name)
        self.keep()

    @rule()
    def restart(self) -> None:
        """A new machine from the journal alone; open attempts get a fresh lease."""
        rows: dict[str, list[tuple[int, Any]]] = {"rollout": [], "attempt": [], "worker": []}
        for (kind, _), (place, record) in self.journal.items():
            rows[kind].append((place, from_json(to_json(record), type(record))))
        created = {name: i for i, name in enumerate(self.models)}
        spans = [
            SpanTotals(
                key,
                sum(n for _, n in kept.values()),
                max(f + n - 1 for f, n in kept.values()),
                10 * len(kept),
            )
            for key, kept in self.batches.items()
        ]
        before = self.machine
        self.machine = Machine(lease_seconds=LEASE)
        self.machine.restore(
            Snapshot(
                rollouts=sorted(
                    (created[record.rollout_id], place, record) for place, record in rows["rollout"]
                ),
                attempts=[record for _, record in sorted(rows["attempt"], key=lambda row: row[0])],
                workers=[record for _, record in rows["worker"]],
                spans=spans,
                batches=[
                    (batch, key, entry)
                    for key, old in before.state.batches.items()
                    for batch, entry in old.items()
                ],
            ),
            self.now,
        )
        for key in self.open_keys():
            self.of(key)["alive"] = self.now
        assert self.machine.state.drain() == {}
        assert self.machine.state.counts() == before.state.counts()
        now, then = self.machine.state.requests, before.state.requests
        assert {name: set(keys) for name, keys in now.items()} == {
            name: set(keys) for name, keys in then.items()
        }

    @invariant()
    def queue_is_the_models(self) -> None:
        if hasattr(self, "machine"):
            assert list(self.machine.state.queue) == self.queue
            assert len(set(self.queue)) == len(self.queue)

    @invariant()
    def records_are_the_models(self) -> None:
        for name, model in getattr(self, "models", {}).items():
            rollout = self.machine.state.rollouts[name]
            attempts = list(self.machine.state.attempts.get(name, {}).values())
            assert [(one.attempt_id, one.end_reason) for one in attempts] == [
                (one["id"], one["reason"]) for one in model.attempts
            ]
            assert [one.sequence_id for one in attempts] == list(range(1, len(attempts) + 1))
            assert rollout.num_attempts == len(attempts)
            if model.final is not None:
                assert rollout.status.value == model.final
            else:
                assert not rollout.status.final
            assert rollout.status.waiting == (name in self.queue)
            assert (rollout.end_time is not None) == rollout.status.final
            for one in attempts:
                assert (
                    (one.end_time is not None) == one.status.final == (one.end_reason is not None)
                )
                assert one.num_spans == sum(
                    n for _, n in self.batches.get((name, one.attempt_id), {}).values()
                )

    @invariant()
    def counters_are_what_counting_gives(self) -> None:
        if not hasattr(self, "machine"):
            return
        state = self.machine.state
        counts = state.counts()
        by_status = Counter(one.status.value for one in state.rollouts.values())
        assert {k: v for k, v in counts["rollouts_by_status"].items() if v} == dict(by_status)
        attempts = [one for many in state.attempts.values() for one in many.values()]
        by_reason = Counter(one.end_reason.value for one in attempts if one.end_reason)
        assert {k: v for k, v in counts["attempts_by_reason"].items() if v} == dict(by_reason)
        assert counts["attempts"] == len(attempts)
        assert sorted(state.open) == sorted(self.open_keys())
        held = {(w, key) for w, keys in state.open_of_worker.items() for key in keys}
        assert held == {
            (self.of(key)["worker"], key) for key in self.open_keys() if self.of(key)["worker"]
        }
        for worker in state.workers.values():
            assert (worker.status == "busy") == (worker.worker_id in state.open_of_worker)


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
