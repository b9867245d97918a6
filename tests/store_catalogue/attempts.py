"""Attempts of one rollout: their numbers, who moves the rollout."""

from __future__ import annotations

import pytest

from agl_ray.store import LightningStore
from agl_ray.types import AttemptStatus, Conflict, EndReason, NotFound, RolloutConfig, RolloutStatus
from store_catalogue.common import a_span, end_ok, key_of, queued, status_of, taken


async def numbers_rise(store: LightningStore) -> None:
    first = await store.start_rollout(1, worker_id="w")
    second = await store.start_attempt(first.rollout_id, worker_id="v")
    third = await store.start_attempt(first.rollout_id)
    assert [one.attempt.sequence_id for one in (first, second, third)] == [1, 2, 3]
    assert len({one.attempt_id for one in (first, second, third)}) == 3
    assert (second.attempt.worker_id, third.attempt.worker_id) == ("v", None)
    latest = await store.get_latest_attempt(first.rollout_id)
    assert latest is not None
    assert latest.attempt_id == third.attempt_id


async def an_attempt_by_hand_ignores_max_attempts(store: LightningStore) -> None:
    first = await store.start_rollout(1, config=RolloutConfig(max_attempts=1))
    again = await store.start_attempt(first.rollout_id)
    assert (again.attempt.sequence_id, again.status) == (2, "preparing")
    with pytest.raises(NotFound, match="ro-none"):
        await store.start_attempt("ro-none")
    with pytest.raises(ValueError, match="ro-none"):
        await store.start_attempt("ro-none")


async def an_attempt_by_hand_takes_a_rollout_out_of_the_queue(store: LightningStore) -> None:
    (rollout_id,) = await queued(store, 1)
    await store.start_attempt(rollout_id)
    assert await store.dequeue_rollout() is None
    assert await status_of(store, rollout_id) == "preparing"


async def only_the_latest_moves_its_rollout(store: LightningStore) -> None:
    old = await store.start_rollout(1)
    new = await store.start_attempt(old.rollout_id)
    await store.update_attempt(*key_of(old), status=AttemptStatus.FAILED)
    assert await status_of(store, old.rollout_id) == "preparing"
    await store.add_span(a_span(new, "a"))
    assert await status_of(store, old.rollout_id) == "running"
    await end_ok(store, new)
    assert await status_of(store, old.rollout_id) == "succeeded"


async def latest_is_a_name(store: LightningStore) -> None:
    first = await store.start_rollout(1)
    second = await store.start_attempt(first.rollout_id)
    changed = await store.update_attempt(first.rollout_id, "latest", metadata={"a": 1})
    assert changed.attempt_id == second.attempt_id
    assert changed.metadata["a"] == 1
    assert (await store.get_attempt(first.rollout_id, "latest")) == changed
    with pytest.raises(NotFound, match="ro-none"):
        await store.update_attempt("ro-none", "latest", metadata={})
    (waiting,) = await queued(store, 2)
    with pytest.raises(NotFound, match="no attempt"):
        await store.update_attempt(waiting, "latest", metadata={})
    with pytest.raises(NotFound, match="at-none"):
        await store.update_attempt(first.rollout_id, "at-none", metadata={})


async def an_update_changes_what_is_given(store: LightningStore) -> None:
    attempt = await store.start_rollout(1, worker_id="w")
    beaten = await store.update_attempt(*key_of(attempt), last_heartbeat_time=12.5)
    assert (beaten.last_heartbeat_time, beaten.worker_id) == (12.5, "w")
    assert beaten.status is AttemptStatus.PREPARING
    running = await store.update_attempt(*key_of(attempt), status=AttemptStatus.RUNNING)
    assert running.worker_id == "w"
    assert await status_of(store, attempt.rollout_id) == "running"


async def a_rollout_update_changes_what_is_given(store: LightningStore) -> None:
    rollout = await store.enqueue_rollout(1, mode="train", metadata={"a": 1})
    config = RolloutConfig(max_attempts=5)
    changed = await store.update_rollout(rollout.rollout_id, config=config, input={"new": 1})
    assert (changed.mode, changed.metadata) == ("train", {"a": 1})
    assert (changed.config, changed.input) == (config, {"new": 1})
    cleared = await store.update_rollout(rollout.rollout_id, mode=None)
    assert cleared.mode is None
    assert cleared.status is RolloutStatus.QUEUING
    with pytest.raises(NotFound, match="ro-none"):
        await store.update_rollout("ro-none", mode="val")


async def failed_attempts_are_retried_while_listed_and_left(store: LightningStore) -> None:
    listed = RolloutConfig(max_attempts=3, retry_condition=("failed",))
    other = RolloutConfig(max_attempts=3, retry_condition=("timeout",))
    (rollout_id,) = await queued(store, 1, config=listed)
    for number in (1, 2, 3):
        attempt = await taken(store)
        assert attempt.attempt.sequence_id == number
        await store.end_attempt(*key_of(attempt), EndReason.AGENT_ERROR)
        expected = "failed" if number == 3 else "requeuing"
        assert await status_of(store, rollout_id) == expected
    assert await store.dequeue_rollout() is None
    (rollout_id,) = await queued(store, 2, config=other)
    await store.end_attempt(*key_of(await taken(store)), EndReason.AGENT_ERROR)
    assert await status_of(store, rollout_id) == "failed"


async def an_old_attempt_does_not_end_the_retry(store: LightningStore) -> None:
    config = RolloutConfig(max_attempts=3, retry_condition=("unresponsive",))
    await queued(store, 1, config=config)
    old = await taken(store, "old")
    await store.worker_lost("old", "killed")
    new = await taken(store, "new")
    late = await store.end_attempt(*key_of(old), EndReason.OK, reward=1.0)
    assert late.end_reason is EndReason.LOST
    assert await status_of(store, old.rollout_id) == "preparing"
    await end_ok(store, new, reward=0.5)
    rollout = await store.get_rollout_by_id(old.rollout_id)
    assert rollout is not None
    assert rollout.status is RolloutStatus.SUCCEEDED


async def an_end_is_final(store: LightningStore) -> None:
    attempt = await store.start_rollout(1)
    await end_ok(store, attempt)
    with pytest.raises(Conflict, match="already ended ok"):
        await store.end_attempt(*key_of(attempt), EndReason.AGENT_ERROR)
    with pytest.raises(Conflict, match="cannot"):
        await store.update_attempt(*key_of(attempt), status=AttemptStatus.RUNNING)
    with pytest.raises(Conflict, match="final"):
        await store.update_rollout(attempt.rollout_id, status=RolloutStatus.RUNNING)
    assert await status_of(store, attempt.rollout_id) == "succeeded"
