"""What agent-lightning's own tests do not cover: finality, restarts, memory, load."""

from __future__ import annotations

import asyncio
import random

import pytest

from agl_ray.store import LightningStore
from agl_ray.types import AttemptStatus, Conflict, EndReason, RolloutConfig, RolloutStatus
from store_catalogue.common import (
    MODEL,
    Restart,
    a_batch,
    a_span,
    end_ok,
    key_of,
    needs,
    queued,
    status_of,
    taken,
)


async def cancelled_is_final(store: LightningStore) -> None:
    attempt = await store.start_rollout(1, worker_id="w")
    (waiting,) = await queued(store, 2)
    rollouts = await store.cancel_rollouts([attempt.rollout_id, waiting])
    assert {one.status for one in rollouts} == {RolloutStatus.CANCELLED}
    assert all(one.end_time is not None for one in rollouts)
    ended = await store.get_attempt(*key_of(attempt))
    assert (ended.end_reason, ended.end_time is None) == (EndReason.CANCELLED, False)
    assert (await end_ok(store, attempt)).end_reason is EndReason.CANCELLED
    await store.update_attempt(*key_of(attempt), metadata={"a": 1})
    await store.add_span(a_span(attempt, "late"))
    now = await store.get_rollout_by_id(attempt.rollout_id)
    assert now == rollouts[0]
    with pytest.raises(Conflict):
        await store.update_rollout(waiting, status=RolloutStatus.SUCCEEDED)
    with pytest.raises(Conflict, match="cancelled"):
        await store.start_attempt(waiting)
    assert await store.cancel_rollouts([waiting]) == [rollouts[1]]
    again = await store.update_rollout(waiting, status=RolloutStatus.REQUEUING)
    assert again.end_time is None
    assert (await taken(store)).rollout_id == waiting


async def the_last_retry_is_the_last(store: LightningStore) -> None:
    config = RolloutConfig(max_attempts=2, retry_condition=("failed", "unresponsive"))
    (rollout_id,) = await queued(store, 1, config=config)
    await store.update_attempt(*key_of(await taken(store)), status=AttemptStatus.FAILED)
    assert await status_of(store, rollout_id) == "requeuing"
    await store.update_attempt(*key_of(await taken(store)), status=AttemptStatus.FAILED)
    assert await status_of(store, rollout_id) == "failed"
    assert await store.dequeue_rollout() is None


async def a_repeated_request_takes_nothing_twice(
    store: LightningStore, elsewhere: LightningStore, restart: Restart
) -> None:
    """Request ids of the caller's own: over another client, after its attempt has ended, and after a restart."""
    await queued(store, 1, 2, 3)
    first = await store.dequeue_many_rollouts(limit=2, worker_id="w", request_id="take")
    again = await elsewhere.dequeue_many_rollouts(limit=2, worker_id="w", request_id="take")
    assert [key_of(one) for one in again] == [key_of(one) for one in first]
    await end_ok(store, first[0])
    again = await elsewhere.dequeue_many_rollouts(limit=2, worker_id="w", request_id="take")
    assert [one.attempt.end_reason for one in again] == [EndReason.OK, None]
    made = await store.start_rollout({"a": 1}, request_id="make")
    await end_ok(store, made)
    store = await restart()
    open_ones = await store.dequeue_many_rollouts(limit=2, worker_id="w", request_id="take")
    assert [key_of(one) for one in open_ones] == [key_of(first[1])]
    assert key_of(await store.start_rollout({"a": 1}, request_id="make")) == key_of(made)
    with pytest.raises(Conflict, match="another rollout"):
        await store.start_rollout({"a": 2}, request_id="make")
    more = await store.start_attempt(first[1].rollout_id, request_id="more")
    assert key_of(await store.start_attempt(more.rollout_id, request_id="more")) == key_of(more)
    assert (await store.statistics())["attempts"] == 4
    assert (await store.statistics())["queue"] == 1


async def taking_is_one_step(store: LightningStore, restart: Restart) -> None:
    """After a crash a rollout is either waiting or has the attempt that was given out: never neither."""
    ids = await queued(store, *range(20))
    found = await asyncio.gather(*(store.dequeue_rollout(f"w{i}") for i in range(8)))
    given = {one.rollout_id: one.attempt_id for one in found if one is not None}
    store = await restart()
    for rollout_id in ids:
        attempts = [one.attempt_id for one in await store.query_attempts(rollout_id)]
        waiting = await status_of(store, rollout_id) == "queuing"
        assert attempts == ([] if waiting else [given[rollout_id]])
    rest = await store.dequeue_many_rollouts(limit=50)
    assert [one.rollout_id for one in rest] == [one for one in ids if one not in given]


async def a_restart_keeps_everything_acknowledged(store: LightningStore, restart: Restart) -> None:
    snapshot = await store.add_resources({"main": MODEL})
    ids = await queued(store, *range(5), mode="train", metadata={"a": [1]})
    done, running = await taken(store, "w"), await taken(store, "v")
    await store.add_spans(*key_of(done), a_batch(done, "a", "b"))
    await store.add_span(a_span(running, "c"))
    await end_ok(store, done, reward=0.5)
    await store.put_state("controller", b"\x00step 3")
    rollouts = [await store.get_rollout_by_id(one) for one in ids]
    spans = [list(await store.query_spans(one)) for one in ids]
    ended = await store.get_attempt(*key_of(done))
    counts = await store.statistics()
    store = await restart()
    assert [await store.get_rollout_by_id(one) for one in ids] == rollouts
    assert [list(await store.query_spans(one)) for one in ids] == spans
    assert await store.get_attempt(*key_of(done)) == ended
    assert await store.get_latest_resources() == snapshot
    assert await store.get_state("controller") == b"\x00step 3"
    after = await store.statistics()
    for name in ("rollouts_by_status", "attempts_by_reason", "spans", "span_bytes", "queue"):
        assert after[name] == counts[name], name
    assert after["restarts"] == counts["restarts"] + 1
    alive = await store.get_attempt(*key_of(running))
    assert (alive.status, alive.num_spans) == (AttemptStatus.RUNNING, 1)
    stored = await store.add_span(a_span(running, "d"))
    assert stored is not None
    assert stored.sequence_id == 2
    assert (await end_ok(store, running)).end_reason is EndReason.OK
    rest = await store.dequeue_many_rollouts(limit=9)
    assert [one.rollout_id for one in rest] == ids[2:]
    page = await store.query_rollouts()
    assert [one.rollout_id for one in page] == ids


async def what_a_dead_process_had_taken_is_given_again_once(
    store: LightningStore, restart: Restart
) -> None:
    config = RolloutConfig(unresponsive_seconds=0.5)
    (rollout_id,) = await queued(store, 1, config=config)
    await taken(store, "died-with-the-store")
    store = await restart()
    again = await store.dequeue_rollout("w", wait_seconds=20)
    assert again is not None
    assert (again.rollout_id, again.attempt.sequence_id) == (rollout_id, 2)
    await end_ok(store, again)
    assert await store.dequeue_rollout() is None
    assert len(await store.query_attempts(rollout_id)) == 2


@needs(memory_mib=1.0, cache_mib=1.0)
async def memory_is_bounded_and_nothing_is_lost_to_it(store: LightningStore) -> None:
    """Ten times as much as may stay in memory: all of it is still read, queried and taken."""
    text = "x" * 20_000
    ids = []
    for start in range(0, 500, 50):
        ids += await queued(store, *({"n": start + i, "text": text} for i in range(50)))
    for _ in range(10):
        batch = await store.dequeue_many_rollouts(limit=25)
        await asyncio.gather(*(store.add_span(a_span(one, "s")) for one in batch))
        await asyncio.gather(*(end_ok(store, one) for one in batch))
    found = await asyncio.gather(*(store.get_rollout_by_id(one) for one in ids[::7]))
    assert [one.input["n"] for one in found if one is not None] == list(range(500))[::7]
    page = await store.query_rollouts(status_in=["succeeded"], limit=10, offset=240)
    assert ([one.input["n"] for one in page], page.total) == (list(range(240, 250)), 250)
    assert len(await store.query_spans(ids[3])) == 1
    late = await store.add_span(a_span((await store.query_attempts(ids[3]))[0], "late"))
    assert late is not None
    assert late.sequence_id == 2
    rest = await store.dequeue_many_rollouts(limit=500)
    assert [one.input["n"] for one in rest] == list(range(250, 500))


async def spans_in_mixed_order_at_load(store: LightningStore, elsewhere: LightningStore) -> None:
    attempts = [await store.start_rollout(i) for i in range(4)]
    work = []
    for number in range(200):
        attempt = attempts[number % 4]
        given = number // 4 + 1 if number % 3 == 0 else None
        work.append(a_span(attempt, f"s{number}", sequence_id=given))
    random.Random(7).shuffle(work)
    clients = (store, elsewhere)
    stored = await asyncio.gather(
        *(clients[i % 2].add_span(one) for i, one in enumerate(work)),
        *(clients[i % 2].add_span(one) for i, one in enumerate(work[:50])),
    )
    assert sum(one is None for one in stored) == 50
    for attempt in attempts:
        found = await store.query_spans(attempt.rollout_id)
        sent = [one.span_id for one in work if one.rollout_id == attempt.rollout_id]
        assert sorted(str(one.span_id) for one in found) == sorted(map(str, sent))
        numbers = [one.sequence_id for one in found]
        assert numbers == sorted(numbers, key=lambda number: number or 0)
        explicit = {one.span_id: one.sequence_id for one in work if one.sequence_id is not None}
        assert all(explicit.get(one.span_id, one.sequence_id) == one.sequence_id for one in found)


@needs(span_seconds=0.1)
async def lost_spans_are_visible(store: LightningStore) -> None:
    attempt = await store.start_rollout(1)
    await store.add_span(a_span(attempt, "a"))
    ended = await store.end_attempt(*key_of(attempt), EndReason.OK, reward=1.0, expected_spans=2)
    assert (ended.end_reason, ended.reward) == (EndReason.LOST, None)
    assert "1 of the attempt's 2 spans" in (ended.error or "")
