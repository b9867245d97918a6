"""The store against a simple model, under any order of commands and restarts.

Three stores: one that keeps everything in memory, and two (over memory and SQLite) that may keep about two rollouts, so that most
commands name something that has left memory.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec import UNSET

from agl_ray.store.core import StoreCore
from agl_ray.store.journals.base import Condition, Journal, Query
from agl_ray.store.journals.memory import MemoryJournal
from agl_ray.store.journals.sqlite import SqliteJournal
from agl_ray.types import (
    LLM,
    Attempt,
    AttemptStatus,
    Conflict,
    EndReason,
    EnqueueRolloutRequest,
    NotFound,
    RolloutConfig,
    RolloutStatus,
)

T = TypeVar("T")

LEASE = 30.0
WORKERS = ("w1", "w2")
RETRYABLE = (AttemptStatus.FAILED, AttemptStatus.TIMEOUT, AttemptStatus.UNRESPONSIVE)
CHECKED = 4  # rollouts looked at after each step; all of them at a restart
LATE = (EndReason.LOST, EndReason.TIMEOUT, EndReason.CANCELLED)


class Clocked(StoreCore):
    """A core whose time is the test's."""

    time = 1000.0

    def now(self) -> float:
        return self.time


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
    memory_mib = 64.0

    def make_journal(self) -> Journal:
        return MemoryJournal()

    @initialize()
    def start(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.journal = self.make_journal()
        self.open()
        self.now = 1000.0
        self.models: dict[str, Model] = {}
        self.queue: list[str] = []
        self.batches: dict[tuple[str, str], dict[str, tuple[int, int]]] = {}
        self.resources: dict[str, tuple[int, str]] = {}  # version, endpoint; the latest last
        self.values: dict[str, bytes] = {}
        self.counter = 0

    def open(self) -> None:
        async def opened() -> Clocked:
            core = Clocked(
                "test://",
                self.journal,
                lease_seconds=LEASE,
                memory_mib=self.memory_mib,
                cache_mib=0.0,
                span_seconds=5.0,
            )
            core.time = getattr(self, "now", 1000.0)
            await core._start(must_exist=False)
            assert core._clock is not None
            core._clock.cancel()  # the test ticks
            return core

        self.core = self.loop.run_until_complete(opened())

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            self.check(list(self.models))
            self.do(self.core.close())
            self.loop.close()

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        self.core.time = self.now
        return self.loop.run_until_complete(work)

    def fresh(self, prefix: str) -> str:
        self.counter += 1
        return f"{prefix}-{self.counter}"

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
        first = self.do(self.core.enqueue(requests))
        self.now += 1.0
        assert self.do(self.core.enqueue(requests)) == first
        for name in names:
            self.models[name] = Model(config)
            self.queue.append(name)

    @rule(limit=st.integers(1, 3), worker=st.sampled_from([*WORKERS, None]), repeat=st.booleans())
    def dequeue(self, limit: int, worker: str | None, repeat: bool) -> None:
        request = self.fresh("rq")
        taken = self.do(self.core.dequeue(limit, worker, 0.0, request))
        expected, self.queue = self.queue[:limit], self.queue[limit:]
        assert [one.rollout_id for one in taken] == expected
        for one in taken:
            self.note_begin(one, worker)
        if repeat and taken:
            again = self.do(self.core.dequeue(limit, worker, 0.0, request))
            assert [one.attempt_id for one in again] == [one.attempt_id for one in taken]

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def start_attempt(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.models)))
        try:
            taken = self.do(self.core.start_attempt(name, "w1", self.fresh("rq")))
        except Conflict:
            assert self.models[name].final is not None
            return
        assert self.models[name].final is None
        self.queue = [one for one in self.queue if one != name]
        self.note_begin(taken, "w1")

    @precondition(lambda self: self.every_key())
    @rule(data=st.data(), reason=st.sampled_from(EndReason))
    def end(self, data: st.DataObject, reason: EndReason) -> None:
        key = data.draw(st.sampled_from(self.every_key()))
        before = next(one for one in self.models[key[0]].attempts if one["id"] == key[1])["reason"]
        try:
            ended = self.do(self.core.end_attempt(*key, reason, 1.0))
        except Conflict:
            assert before is not None
            assert before is not reason
            assert before not in LATE
            return
        assert before in (None, reason, *LATE)
        assert ended.end_reason is (reason if before is None else before)
        if before is None:
            self.note_end(key, reason)

    @precondition(lambda self: self.every_key())
    @rule(data=st.data(), number=st.integers(1, 4), repeat=st.booleans())
    def add_spans(self, data: st.DataObject, number: int, repeat: bool) -> None:
        key = data.draw(st.sampled_from(self.every_key()))
        batch = self.fresh("ba")
        total = sum(
            n for k, kept in self.batches.items() if k[0] == key[0] for _, n in kept.values()
        )
        items = [(*key, batch, number, b"payload of spans")] * (1 + repeat)
        for entry in self.do(self.core.add_spans(items)):
            assert entry == (total + 1, number)
        self.batches.setdefault(key, {})[batch] = (total + 1, number)
        one = next(one for one in self.models[key[0]].attempts if one["id"] == key[1])
        if one["reason"] is None:
            one["alive"] = self.now

    @rule(worker=st.sampled_from(WORKERS))
    def heartbeat(self, worker: str) -> None:
        mine = [key for key in self.open_keys() if self.of(key)["worker"] == worker]
        self.do(self.core.update_worker(worker, UNSET, [*mine, ("ro-x", "at-x")]))
        for key in mine:
            self.of(key)["alive"] = self.now

    def of(self, key: tuple[str, str]) -> dict[str, Any]:
        return next(one for one in self.models[key[0]].attempts if one["id"] == key[1])

    @rule(worker=st.sampled_from(WORKERS))
    def worker_lost(self, worker: str) -> None:
        mine = [key for key in self.open_keys() if self.of(key)["worker"] == worker]
        lost = self.do(self.core.worker_lost(worker, "killed"))
        order = [(one.rollout_id, one.attempt_id) for one in lost]
        assert sorted(order) == sorted(mine)
        for key in order:
            self.note_end(key, EndReason.LOST)

    @rule(seconds=st.sampled_from([0.1, 20.0, 31.0, 70.0]))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        ended = self.core.machine.tick(self.now)
        self.do(self.core._settled())
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

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.models)))
        self.do(self.core.cancel_rollouts([name]))
        model = self.models[name]
        if model.final is None:
            model.final = "cancelled"
            self.queue = [one for one in self.queue if one != name]
            for one in model.attempts:
                one["reason"] = one["reason"] or EndReason.CANCELLED

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def requeue(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.models)))
        model = self.models[name]
        waits = name in self.queue
        open_latest = bool(model.attempts) and model.attempts[-1]["reason"] is None
        try:
            self.do(self.core.update_rollout(name, {"status": RolloutStatus.REQUEUING}))
        except Conflict:
            assert open_latest
            return
        assert not open_latest
        model.final = None
        if not waits:
            self.queue.append(name)

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.models)), min_size=1, max_size=2))
        models = [self.models[name] for name in names]
        refused = any(
            model.final is None or any(one["reason"] is None for one in model.attempts)
            for model in models
        )
        try:
            self.do(self.core.forget([*names, "ro-unknown"]))
        except Conflict:
            assert refused
            return
        assert not refused
        for name in set(names):
            del self.models[name]
            self.batches = {key: kept for key, kept in self.batches.items() if key[0] != name}
            assert self.do(self.core.get_rollout(name)) is None
            try:
                self.do(self.core.query_attempts(name))
            except NotFound:
                continue
            raise AssertionError(f"{name} was forgotten")

    @rule(name=st.sampled_from(["rs-1", "rs-2", "rs-3"]))
    def publish(self, name: str) -> None:
        endpoint = self.fresh("http")
        told = self.do(
            self.core.update_resources(name, {"m": LLM(endpoint=endpoint, model="m" * 500)})
        )
        version = self.resources.pop(name, (0, ""))[0] + 1
        assert told.version == version
        self.resources[name] = (version, endpoint)

    @rule(name=st.sampled_from(["a/1", "a/2", "b/1"]))
    def keep_value(self, name: str) -> None:
        self.values[name] = self.fresh("v").encode() * 200
        self.do(self.core.put_state(name, self.values[name]))

    @rule()
    def restart(self) -> None:
        """A new core from the journal alone; open attempts get a fresh lease."""
        before = self.core.machine.state
        self.do(self.core.close())
        self.journal = self.reopened()
        self.open()
        for key in self.open_keys():
            self.of(key)["alive"] = self.now
        state = self.core.machine.state
        assert state.changes == {}
        assert state.counts() == before.counts()
        assert {name: set(keys) for name, keys in state.requests.open.items()} == {
            name: set(keys) for name, keys in before.requests.open.items()
        }
        assert state.batches == before.batches
        assert set(state.rollouts) == {key[0] for key in self.open_keys()}
        self.check(list(self.models))

    def reopened(self) -> Journal:
        return self.journal

    @invariant()
    def some_records_are_the_models(self) -> None:
        if hasattr(self, "core"):
            names = list(self.models)
            at = self.counter % max(1, len(names))
            self.check((names[at:] + names[:at])[:CHECKED])

    def check(self, names: list[str]) -> None:
        self.do(self.compare(names))

    async def compare(self, names: list[str]) -> None:
        rollouts, total = await self.core.find_rollouts(
            Query("rollout", must=(Condition("key", tuple(names)),), order_by="created", count=True)
        )
        assert [one.rollout_id for one in rollouts] == [one for one in self.models if one in names]
        assert total == len(names)
        of_name = {one.rollout_id: one for one in rollouts}
        for name in names:
            attempts = await self.core.query_attempts(name)
            assert await self.core.get_rollout(name) == of_name[name]
            assert await self.core.get_latest_attempt(name) == (attempts[-1] if attempts else None)
            query = Query("attempt", (Condition("rollout_id", (name,)),), order_by="position")
            assert (await self.core.find_attempts(query))[0] == attempts
            self.compare_one(name, of_name[name], attempts)
        final, _ = await self.core.wait_for_rollouts([*names, "ro-unknown"], 0.0, None)
        assert [one.rollout_id for one in final] == [
            name for name in names if self.models[name].final is not None
        ]

    def compare_one(self, name: str, rollout: Any, attempts: list[Attempt]) -> None:
        model = self.models[name]
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
            assert (one.end_time is not None) == one.status.final == (one.end_reason is not None)
            batches = self.batches.get((name, one.attempt_id), {})
            assert one.num_spans == sum(number for _, number in batches.values())

    @invariant()
    def other_records_are_the_models(self) -> None:
        if not hasattr(self, "core"):
            return
        for name, (version, endpoint) in self.resources.items():
            found = self.do(self.core.get_resources(name))
            assert found is not None
            assert (found.version, found.resources["m"].endpoint) == (version, endpoint)
        latest = self.do(self.core.get_resources(None))
        assert (latest and latest.resources_id) == next(reversed(self.resources), None)
        for key, value in self.values.items():
            assert self.do(self.core.get_state(key)) == value
        assert self.do(self.core.list_state("a/")) == sorted(
            key for key in self.values if key.startswith("a/")
        )

    @invariant()
    def counters_are_what_counting_gives(self) -> None:
        if not hasattr(self, "core"):
            return
        state = self.core.machine.state
        assert list(state.queue) == self.queue
        assert len(set(self.queue)) == len(self.queue)
        counts = state.counts()
        tries = [one for model in self.models.values() for one in model.attempts]
        reasons = Counter(one["reason"].value for one in tries if one["reason"])
        assert {k: v for k, v in counts["attempts_by_reason"].items() if v} == dict(reasons)
        finals = Counter(model.final for model in self.models.values() if model.final)
        by_status = counts["rollouts_by_status"]
        assert {k: by_status[k] for k in ("succeeded", "failed", "cancelled") if by_status[k]} == {
            **finals
        }
        assert by_status["queuing"] + by_status["requeuing"] == len(self.queue)
        assert counts["rollouts"] == len(self.models)
        assert counts["attempts"] == len(tries)
        assert counts["resources"] == len(self.resources)
        kept = [one for batches in self.batches.values() for one in batches.values()]
        assert counts["spans"] == sum(number for _, number in kept)
        assert counts["span_bytes"] == len(b"payload of spans") * len(kept)
        assert sorted(state.open) == sorted(self.open_keys())
        held = {(w, key) for w, keys in state.open_of_worker.items() for key in keys}
        assert held == {
            (self.of(key)["worker"], key) for key in self.open_keys() if self.of(key)["worker"]
        }
        for worker in state.workers.values():
            assert (worker.status == "busy") == (worker.worker_id in state.open_of_worker)

    @invariant()
    def memory_is_bounded(self) -> None:
        """What is open stays, and the latest resources do; of the rest no more than allowed."""
        if not hasattr(self, "core"):
            return
        state = self.core.machine.state
        weights = state.residents._weights
        assert state.residents.size == sum(weights.values())
        assert set(weights) == {
            *(("rollout", one) for one in state.rollouts),
            *(("resources", one) for one in state.resources),
            *(("state", one) for one in state.values),
        }
        assert not state.residents._pins
        assert set(state.rollouts) == set(state.tallies)
        assert {name for name, tries in state.attempts.items() if tries} <= set(state.rollouts)
        loose = sum(weight for key, weight in weights.items() if not state._stays(key))
        kept, most = state.residents.size - loose, state.residents.max_bytes
        assert loose <= max(most - kept, most // 8)


class BoundedMachine(StoreMachine):
    memory_mib = 0.008


class SqliteMachine(StoreMachine):
    memory_mib = 0.008

    def make_journal(self) -> Journal:
        self.folder = tempfile.TemporaryDirectory()
        return self.reopened()

    def reopened(self) -> Journal:
        return SqliteJournal(Path(self.folder.name) / "store.db")

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "folder"):
            self.folder.cleanup()


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBoundedMachine = BoundedMachine.TestCase
TestBoundedMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSqliteMachine = SqliteMachine.TestCase
TestSqliteMachine.settings = settings(max_examples=15, stateful_step_count=40, deadline=None)
