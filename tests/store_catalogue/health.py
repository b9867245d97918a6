"""Deadlines and signs of life, on the store's own clock."""

from __future__ import annotations

import asyncio
import time

from agl_ray.store import LightningStore
from agl_ray.types import AttemptedRollout, AttemptStatus, EndReason, RolloutConfig, RolloutStatus
from store_catalogue.common import a_span, end_ok, key_of, queued, status_of, taken, until

SHORT = 0.3  # seconds
DEAD = {"unresponsive_seconds": SHORT}


async def _ended(store: LightningStore, attempt: AttemptedRollout) -> None:
    async def has_ended() -> bool:
        return (await store.get_attempt(*key_of(attempt))).status.final

    await until(has_ended)


async def a_timeout_counts_from_the_start_whatever_comes(store: LightningStore) -> None:
    attempt = await store.start_rollout(1, config=RolloutConfig(timeout_seconds=SHORT))
    beats = 0
    while not (await store.get_attempt(*key_of(attempt))).status.final:
        await store.add_span(a_span(attempt, f"s{beats}"))
        beats += 1
        assert beats < 1000
        await asyncio.sleep(0.05)
    ended = await store.get_attempt(*key_of(attempt))
    assert (ended.status, ended.end_reason) == (AttemptStatus.TIMEOUT, EndReason.TIMEOUT)
    assert ended.end_time is not None
    assert ended.end_time - ended.start_time > SHORT
    (rollout,) = await store.wait_for_rollouts(rollout_ids=[attempt.rollout_id], timeout=20)
    assert (rollout.status, rollout.end_time) == (RolloutStatus.FAILED, ended.end_time)


async def silence_is_unresponsive_and_retried_once_by_itself(store: LightningStore) -> None:
    (rollout_id,) = await queued(store, 1, config=RolloutConfig(**DEAD))
    first = await taken(store, "silent")
    second = await store.dequeue_rollout("next", wait_seconds=20)
    assert second is not None
    assert (second.rollout_id, second.attempt.sequence_id) == (rollout_id, 2)
    lost = await store.get_attempt(*key_of(first))
    assert (lost.status, lost.end_reason) == (AttemptStatus.UNRESPONSIVE, EndReason.LOST)
    assert lost.end_time is not None
    (rollout,) = await store.wait_for_rollouts(rollout_ids=[rollout_id], timeout=20)
    assert rollout.status is RolloutStatus.FAILED


async def spans_and_heartbeats_keep_an_attempt_alive(store: LightningStore) -> None:
    for silence in (1.5, 6.0, 24.0):
        config, begun = RolloutConfig(unresponsive_seconds=silence), time.monotonic()
        spans = await store.start_rollout(1, config=config)
        quiet = await store.start_rollout(2, config=config, worker_id="w")
        silent = await store.start_rollout(3, config=config)
        longest = await _beats(store, spans, quiet, silence, begun)
        ends = [await store.get_attempt(*key_of(one)) for one in (spans, quiet, silent)]
        if longest < silence:  # else a slow machine has been silent for us: with more patience
            break
    assert [one.status for one in ends[:2]] == [AttemptStatus.RUNNING] * 2
    assert ends[2].end_reason is EndReason.LOST


async def _beats(
    store: LightningStore,
    spans: AttemptedRollout,
    quiet: AttemptedRollout,
    silence: float,
    last: float,
) -> float:
    """Spans of the one and heartbeats of the other for twice `silence` seconds; the longest time between two, from `last` on."""
    longest = 0.0
    for number in range(12):
        await asyncio.sleep(silence / 6)
        await store.add_span(a_span(spans, f"s{number}"))
        await store.update_worker("w", attempts=[key_of(quiet)])
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    return longest


async def listed_conditions_are_retried_while_attempts_are_left(store: LightningStore) -> None:
    config = RolloutConfig(
        timeout_seconds=3600.0,
        max_attempts=3,
        retry_condition=("unresponsive",),
        **DEAD,
    )
    (rollout_id,) = await queued(store, 1, config=config)
    for number in (1, 2, 3):
        attempt = await store.dequeue_rollout(wait_seconds=20)
        assert attempt is not None
        assert attempt.attempt.sequence_id == number
    (rollout,) = await store.wait_for_rollouts(rollout_ids=[rollout_id], timeout=20)
    assert (rollout.status, rollout.num_attempts) == (RolloutStatus.FAILED, 3)


async def a_span_does_not_revive_what_timed_out(store: LightningStore) -> None:
    attempt = await store.start_rollout(1, config=RolloutConfig(timeout_seconds=SHORT))
    await _ended(store, attempt)
    assert await store.add_span(a_span(attempt, "late")) is not None
    late = await store.get_attempt(*key_of(attempt))
    assert (late.status, late.num_spans) == (AttemptStatus.TIMEOUT, 1)
    assert await status_of(store, attempt.rollout_id) == "failed"


async def what_was_given_up_stays_so_and_its_late_spans_are_kept(store: LightningStore) -> None:
    """agent-lightning revives an unresponsive attempt; here an end is an end, and the retry runs."""
    (rollout_id,) = await queued(store, 1, config=RolloutConfig(**DEAD))
    first = await taken(store)
    await _ended(store, first)
    assert await status_of(store, rollout_id) == "requeuing"
    await store.add_span(a_span(first, "late"))
    late = await end_ok(store, first)
    assert (late.end_reason, late.num_spans) == (EndReason.LOST, 1)
    assert await status_of(store, rollout_id) == "requeuing"
    assert (await taken(store)).attempt.sequence_id == 2


async def a_dead_worker_ends_its_attempts_at_once(store: LightningStore) -> None:
    await queued(store, 1, 2)
    one, two = await taken(store, "w"), await taken(store, "w")
    lost = await store.worker_lost("w", "its process was killed")
    assert {one.attempt_id for one in lost} == {one.attempt_id, two.attempt_id}
    assert {one.end_reason for one in lost} == {EndReason.LOST}
    worker = await store.get_worker_by_id("w")
    assert worker is not None
    assert worker.status == "lost"
    again = await store.dequeue_many_rollouts(limit=5, worker_id="v")
    assert [one.attempt.sequence_id for one in again] == [2, 2]
    assert await store.worker_lost("w", "again") == []


async def an_idle_store_notices_by_itself(store: LightningStore, elsewhere: LightningStore) -> None:
    attempt = await store.start_rollout(1, config=RolloutConfig(**DEAD))
    taker = asyncio.create_task(elsewhere.dequeue_rollout("w", wait_seconds=20))
    found = await taker  # the only calls there are: one start, one wait
    assert found is not None
    assert found.rollout_id == attempt.rollout_id
