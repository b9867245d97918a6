"""The store's state machine alone: rules of retry, propagation, leases, final states, repeated calls."""

from __future__ import annotations

import pytest

from agl_ray.store.machine import Machine
from agl_ray.types import (
    LLM,
    AttemptStatus,
    Conflict,
    EndReason,
    EnqueueRolloutRequest,
    InputError,
    NotFound,
    RolloutConfig,
    RolloutStatus,
)

LEASE = 30.0


@pytest.fixture
def machine() -> Machine:
    return Machine(lease_seconds=LEASE)


def queue(machine: Machine, number: int = 1, now: float = 0.0, **config: object) -> list[str]:
    request = EnqueueRolloutRequest(input={"x": 1}, config=RolloutConfig(**config))
    return [one.rollout_id for one in machine.enqueue([request] * number, now)]


def take(machine: Machine, now: float = 0.0, worker: str = "w", limit: int = 1):
    return machine.dequeue(limit=limit, worker_id=worker, request_id=None, now=now)


def end(machine: Machine, attempt, reason: EndReason, now: float = 1.0, **more: object):
    return machine.end_attempt(attempt.rollout_id, attempt.attempt_id, reason, now=now, **more)


def status(machine: Machine, rollout_id: str) -> RolloutStatus:
    return machine.state.rollouts[rollout_id].status


def test_first_in_first_out_and_requeued_at_the_end(machine: Machine) -> None:
    a, b, c = queue(machine, 3, max_attempts=2, retry_condition=(AttemptStatus.FAILED,))
    first = take(machine)[0]
    assert first.rollout_id == a
    end(machine, first, EndReason.ENGINE_ERROR)
    taken = take(machine, limit=5)
    assert [one.rollout_id for one in taken] == [b, c, a]
    assert taken[-1].attempt.sequence_id == 2
    assert take(machine) == []


@pytest.mark.parametrize(
    ("reason", "condition", "max_attempts", "expected"),
    [
        (EndReason.OK, (), 1, RolloutStatus.SUCCEEDED),
        (EndReason.OK, (AttemptStatus.SUCCEEDED,), 3, RolloutStatus.SUCCEEDED),
        (EndReason.AGENT_ERROR, (), 3, RolloutStatus.FAILED),
        (EndReason.AGENT_ERROR, (AttemptStatus.FAILED,), 2, RolloutStatus.REQUEUING),
        (EndReason.AGENT_ERROR, (AttemptStatus.FAILED,), 1, RolloutStatus.FAILED),
        (EndReason.ENV_ERROR, (AttemptStatus.TIMEOUT,), 2, RolloutStatus.FAILED),
        (EndReason.TIMEOUT, (AttemptStatus.TIMEOUT,), 2, RolloutStatus.REQUEUING),
        (EndReason.TIMEOUT, (), 2, RolloutStatus.FAILED),
        (EndReason.CANCELLED, (AttemptStatus.FAILED,), 2, RolloutStatus.CANCELLED),
        (EndReason.LOST, (), 1, RolloutStatus.REQUEUING),
    ],
)
def test_retry_rule(
    machine: Machine,
    reason: EndReason,
    condition: tuple,
    max_attempts: int,
    expected: RolloutStatus,
) -> None:
    queue(machine, max_attempts=max_attempts, retry_condition=condition)
    attempt = take(machine)[0]
    ended = end(machine, attempt, reason)
    assert ended.end_time == 1.0
    assert ended.status is reason.status
    assert status(machine, attempt.rollout_id) is expected
    rollout = machine.state.rollouts[attempt.rollout_id]
    assert (rollout.end_time is not None) == expected.final


def test_retry_limit_at_its_edge(machine: Machine) -> None:
    queue(machine, max_attempts=3, retry_condition=(AttemptStatus.FAILED,))
    for sequence in (1, 2, 3):
        attempt = take(machine)[0]
        assert attempt.attempt.sequence_id == sequence
        end(machine, attempt, EndReason.ENGINE_ERROR)
    assert status(machine, attempt.rollout_id) is RolloutStatus.FAILED
    assert take(machine) == []


def test_only_the_first_lost_is_requeued_for_free(machine: Machine) -> None:
    (rollout_id,) = queue(machine, max_attempts=1)
    take(machine)
    lost = machine.worker_lost("w", "killed", 1.0)
    assert [one.end_reason for one in lost] == [EndReason.LOST]
    assert status(machine, rollout_id) is RolloutStatus.REQUEUING
    take(machine)
    machine.worker_lost("w", "killed again", 2.0)
    assert status(machine, rollout_id) is RolloutStatus.FAILED
    assert machine.state.workers["w"].status == "lost"


def test_only_the_latest_attempt_moves_its_rollout(machine: Machine) -> None:
    queue(machine)
    old = take(machine)[0]
    new = machine.start_attempt(old.rollout_id, "w2", "rq", 1.0)
    end(machine, old, EndReason.AGENT_ERROR)
    assert status(machine, old.rollout_id) is RolloutStatus.PREPARING
    end(machine, new, EndReason.OK, reward=1.0)
    assert status(machine, old.rollout_id) is RolloutStatus.SUCCEEDED


def test_cancelled_is_final(machine: Machine) -> None:
    queued, running = queue(machine, 2)
    machine.cancel_rollouts([queued], 1.0)
    attempt = take(machine, 1.0)[0]
    assert attempt.rollout_id == running
    machine.cancel_rollouts([running], 2.0)
    late = end(machine, attempt, EndReason.OK, reward=1.0)
    assert late.end_reason is EndReason.CANCELLED
    assert late.reward is None
    machine.update_attempt(running, attempt.attempt_id, 3.0, metadata={"note": 1})
    assert status(machine, running) is status(machine, queued) is RolloutStatus.CANCELLED
    assert machine.state.rollouts[running].end_time == 2.0


def test_explicit_requeue_clears_the_end_and_is_the_only_way_back(machine: Machine) -> None:
    (rollout_id,) = queue(machine)
    end(machine, take(machine)[0], EndReason.AGENT_ERROR)
    for wrong in (RolloutStatus.SUCCEEDED, RolloutStatus.CANCELLED, RolloutStatus.RUNNING):
        with pytest.raises(Conflict):
            machine.update_rollout(rollout_id, 2.0, status=wrong)
    again = machine.update_rollout(rollout_id, 2.0, status=RolloutStatus.REQUEUING)
    assert again.end_time is None
    assert take(machine)[0].attempt.sequence_id == 2
    with pytest.raises(Conflict, match="open attempt"):
        machine.update_rollout(rollout_id, 2.0, status=RolloutStatus.REQUEUING)


def test_setting_a_rollout_final_ends_its_open_attempt(machine: Machine) -> None:
    queue(machine)
    attempt = take(machine)[0]
    machine.update_rollout(attempt.rollout_id, 2.0, status=RolloutStatus.SUCCEEDED)
    assert machine.state.attempt(*key_of(attempt)).end_reason is EndReason.CANCELLED
    assert status(machine, attempt.rollout_id) is RolloutStatus.SUCCEEDED


def key_of(attempt) -> tuple[str, str]:
    return (attempt.rollout_id, attempt.attempt_id)


def test_lease_runs_out_unless_renewed(machine: Machine) -> None:
    queue(machine, 3)
    quiet, beating, talking = take(machine, limit=3)
    machine.update_worker("w", 20.0, attempts=[key_of(beating)])
    machine.add_spans(key_of(talking), "b", 1, 100, 20.0)
    assert machine.tick(LEASE) == []
    ended = machine.tick(LEASE + 1)
    assert [one.attempt_id for one in ended] == [quiet.attempt_id]
    assert ended[0].end_reason is EndReason.LOST
    assert ended[0].end_time == LEASE + 1
    assert status(machine, quiet.rollout_id) is RolloutStatus.REQUEUING
    assert status(machine, beating.rollout_id) is RolloutStatus.RUNNING
    late = end(machine, quiet, EndReason.OK, now=LEASE + 2, reward=1.0)
    assert late.end_reason is EndReason.LOST


def test_own_lease_and_deadline_of_a_rollout(machine: Machine) -> None:
    queue(machine, unresponsive_seconds=100.0)
    queue(machine, timeout_seconds=10.0)
    patient, hasty = take(machine, limit=2)
    for now in (9.0, 14.0):
        machine.update_worker("w", now, attempts=[key_of(hasty)])
        assert machine.tick(now) == []
    ended = machine.tick(15.5)
    assert [(one.attempt_id, one.end_reason) for one in ended] == [
        (hasty.attempt_id, EndReason.TIMEOUT)
    ]
    assert machine.tick(99.0) == []
    assert [one.attempt_id for one in machine.tick(101.0)] == [patient.attempt_id]


def test_same_end_twice_is_one_end_and_another_is_a_conflict(machine: Machine) -> None:
    queue(machine)
    attempt = take(machine)[0]
    first = end(machine, attempt, EndReason.OK, reward=0.5)
    assert end(machine, attempt, EndReason.OK, now=9.0, reward=0.5) == first
    with pytest.raises(Conflict, match="already ended ok"):
        end(machine, attempt, EndReason.OK, reward=0.75)
    with pytest.raises(Conflict, match="already ended ok"):
        end(machine, attempt, EndReason.AGENT_ERROR)
    assert machine.state.attempts_by_reason[EndReason.OK] == 1


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_is_refused(machine: Machine, reward: float) -> None:
    queue(machine)
    attempt = take(machine)[0]
    with pytest.raises(InputError, match="finite"):
        end(machine, attempt, EndReason.OK, reward=reward)
    assert not machine.state.attempt(*key_of(attempt)).status.final


def test_a_failure_keeps_no_reward(machine: Machine) -> None:
    queue(machine)
    assert end(machine, take(machine)[0], EndReason.AGENT_ERROR, reward=1.0).reward is None


def test_repeated_dequeue_gets_the_same_attempts(machine: Machine) -> None:
    queue(machine, 5)
    first = machine.dequeue(limit=2, worker_id="w", request_id="rq-1", now=0.0)
    again = machine.dequeue(limit=2, worker_id="w", request_id="rq-1", now=1.0)
    assert [one.attempt_id for one in again] == [one.attempt_id for one in first]
    other = machine.dequeue(limit=2, worker_id="w", request_id="rq-2", now=1.0)
    assert not {one.rollout_id for one in other} & {one.rollout_id for one in first}
    assert len(machine.state.queue) == 1


def test_repeated_enqueue_is_one_rollout(machine: Machine) -> None:
    request = EnqueueRolloutRequest(input={"q": 1}, rollout_id="ro-x")
    first = machine.enqueue([request, request], 0.0)
    assert machine.enqueue([request], 5.0) == [first[0]]
    assert len(machine.state.queue) == 1
    with pytest.raises(Conflict, match="ro-x"):
        machine.enqueue([EnqueueRolloutRequest(input={"q": 2}, rollout_id="ro-x")], 5.0)


def test_enqueue_takes_all_or_none(machine: Machine) -> None:
    good = EnqueueRolloutRequest(input=1)
    for bad, error in (
        (EnqueueRolloutRequest(input=1, resources_id="rs-none"), NotFound),
        (EnqueueRolloutRequest(input=object()), InputError),
        (EnqueueRolloutRequest(input=1, rollout_id="a/b"), InputError),
    ):
        with pytest.raises(error):
            machine.enqueue([good, bad], 0.0)
    assert machine.state.rollouts == {}
    assert machine.state.drain() == {}


def test_resources_are_versioned_and_default_to_the_latest(machine: Machine) -> None:
    one, two = ({"llm": LLM(endpoint=f"http://{n}", model="m")} for n in "ab")
    assert machine.enqueue([EnqueueRolloutRequest(input=1)], 0.0)[0].resources_id is None
    machine.add_resources("rs-1", one, 1.0)
    assert machine.add_resources("rs-1", one, 2.0).create_time == 1.0
    with pytest.raises(Conflict):
        machine.add_resources("rs-1", two, 2.0)
    machine.add_resources("rs-2", two, 3.0)
    updated = machine.update_resources("rs-1", two, 4.0)
    assert (updated.version, updated.create_time, updated.update_time) == (2, 1.0, 4.0)
    assert machine.update_resources("rs-1", two, 5.0, repeated=True) == updated
    assert machine.update_resources("rs-1", two, 5.0).version == 3
    assert machine.enqueue([EnqueueRolloutRequest(input=1)], 6.0)[0].resources_id == "rs-1"


def test_spans_number_a_rollout_across_attempts_and_start_it(machine: Machine) -> None:
    queue(machine, retry_condition=(AttemptStatus.FAILED,), max_attempts=2)
    first = take(machine)[0]
    assert machine.add_spans(key_of(first), "b1", 3, 10, 1.0) == (1, 3)
    assert machine.known_batch(key_of(first), "b1") == (1, 3)
    assert status(machine, first.rollout_id) is RolloutStatus.RUNNING
    end(machine, first, EndReason.ENGINE_ERROR)
    assert machine.known_batch(key_of(first), "b1") is None
    second = take(machine)[0]
    assert machine.add_spans(key_of(second), "b1", 1, 10, 2.0) == (4, 1)
    late = machine.add_spans(key_of(first), "b2", 1, 10, 3.0)
    assert late == (5, 1)
    assert machine.state.attempt(*key_of(first)).status is AttemptStatus.FAILED
    assert machine.state.attempt(*key_of(first)).num_spans == 4
    with pytest.raises(NotFound):
        machine.add_spans((first.rollout_id, "at-none"), "b", 1, 10, 1.0)


def test_worker_follows_its_attempts(machine: Machine) -> None:
    queue(machine, 2)
    assert machine.update_worker("w", 0.5, heartbeat_stats={"rss": 1}).status == "unknown"
    a, b = take(machine, limit=2)
    worker = machine.state.workers["w"]
    assert (worker.status, worker.current_attempt_id) == ("busy", b.attempt_id)
    assert worker.heartbeat_stats == {"rss": 1}
    end(machine, b, EndReason.OK)
    assert machine.state.workers["w"].current_attempt_id == a.attempt_id
    end(machine, a, EndReason.OK)
    assert machine.state.workers["w"].status == "idle"
    assert machine.state.workers["w"].current_attempt_id is None


def test_update_attempt_by_hand(machine: Machine) -> None:
    queue(machine, 2)
    a, b = take(machine, limit=2)
    machine.update_attempt(a.rollout_id, "latest", 1.0, status=AttemptStatus.RUNNING)
    assert status(machine, a.rollout_id) is RolloutStatus.RUNNING
    machine.update_attempt(a.rollout_id, "latest", 2.0, status=AttemptStatus.SUCCEEDED)
    assert status(machine, a.rollout_id) is RolloutStatus.SUCCEEDED
    with pytest.raises(Conflict):
        machine.update_attempt(a.rollout_id, "latest", 3.0, status=AttemptStatus.FAILED)
    machine.update_attempt(b.rollout_id, b.attempt_id, 3.0, status=AttemptStatus.RUNNING)
    with pytest.raises(Conflict):
        machine.update_attempt(
            b.rollout_id, b.attempt_id, 3.0, status=AttemptStatus.PREPARING, worker_id="w3"
        )
    assert "w3" not in machine.state.workers
    machine.update_attempt(b.rollout_id, b.attempt_id, 3.0, worker_id="w2")
    assert machine.state.workers["w2"].status == "busy"
    assert machine.state.workers["w"].status == "idle"
    machine.update_attempt(b.rollout_id, b.attempt_id, 4.0, status=AttemptStatus.UNRESPONSIVE)
    assert machine.state.attempt(*key_of(b)).end_reason is EndReason.LOST


def test_errors_may_carry_any_bytes(machine: Machine) -> None:
    queue(machine)
    ended = end(machine, take(machine)[0], EndReason.AGENT_ERROR, error="broken \udcff output")
    assert ended.error == "broken \\udcff output"


def test_unknown_ids_are_not_found(machine: Machine) -> None:
    for call in (
        lambda: machine.end_attempt("ro", "at", EndReason.OK, now=0.0),
        lambda: machine.cancel_rollouts(["ro"], 0.0),
        lambda: machine.start_attempt("ro", None, "rq", 0.0),
        lambda: machine.update_rollout("ro", 0.0, mode="val"),
    ):
        with pytest.raises(NotFound):
            call()
