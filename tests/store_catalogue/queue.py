"""First in, first out."""

from __future__ import annotations

import asyncio
import time

from agl_ray.store import LightningStore
from agl_ray.types import EndReason, RolloutConfig, RolloutStatus
from store_catalogue.common import end_ok, key_of, queued, status_of, taken


async def first_in_is_first_out(store: LightningStore) -> None:
    ids = [(await store.enqueue_rollout(i)).rollout_id for i in range(4)]
    found = [await taken(store) for _ in ids]
    assert [one.rollout_id for one in found] == ids
    assert {one.status for one in found} == {RolloutStatus.PREPARING}
    assert {one.attempt.sequence_id for one in found} == {1}


async def an_empty_queue_gives_none(store: LightningStore) -> None:
    assert await store.dequeue_rollout() is None
    assert await store.dequeue_many_rollouts(limit=5) == []


async def what_no_longer_waits_is_skipped(store: LightningStore) -> None:
    cancelled, started, failed, last = await queued(store, *range(4))
    await store.update_rollout(cancelled, status=RolloutStatus.CANCELLED)
    await store.start_attempt(started)
    await store.update_rollout(failed, status=RolloutStatus.FAILED)
    assert (await taken(store)).rollout_id == last
    assert await store.dequeue_rollout() is None
    assert await status_of(store, cancelled) == "cancelled"


async def a_requeued_rollout_waits_at_the_end(store: LightningStore) -> None:
    first, second = await queued(store, 1, 2)
    one = await taken(store)
    await store.end_attempt(*key_of(one), EndReason.AGENT_ERROR)
    again = await store.update_rollout(first, status=RolloutStatus.REQUEUING)
    assert (again.status, again.end_time) == (RolloutStatus.REQUEUING, None)
    assert (await taken(store)).rollout_id == second
    retried = await taken(store)
    assert (retried.rollout_id, retried.attempt.sequence_id) == (first, 2)
    assert retried.attempt_id != one.attempt_id


async def a_retried_rollout_waits_at_the_end(store: LightningStore) -> None:
    config = RolloutConfig(max_attempts=2, retry_condition=("failed",))
    first, second = await queued(store, 1, 2, config=config)
    await store.end_attempt(*key_of(await taken(store)), EndReason.AGENT_ERROR)
    assert await status_of(store, first) == "requeuing"
    order = [await taken(store) for _ in "12"]
    assert [(one.rollout_id, one.attempt.sequence_id) for one in order] == [(second, 1), (first, 2)]


async def nothing_waits_twice(store: LightningStore) -> None:
    (rollout_id,) = await queued(store, 1)
    await store.update_rollout(rollout_id, status=RolloutStatus.REQUEUING)
    await store.update_rollout(rollout_id, status=RolloutStatus.QUEUING)
    assert (await store.statistics())["queue"] == 1
    assert (await taken(store)).rollout_id == rollout_id
    assert await store.dequeue_rollout() is None


async def bulk_keeps_its_order_and_its_limit(store: LightningStore) -> None:
    ids = await queued(store, *range(7))
    assert [one.rollout_id for one in await store.dequeue_many_rollouts(limit=3)] == ids[:3]
    assert await store.dequeue_many_rollouts(limit=0) == []
    rest = await store.dequeue_many_rollouts(limit=100, worker_id="w")
    assert [one.rollout_id for one in rest] == ids[3:]
    assert {one.attempt.worker_id for one in rest} == {"w"}
    assert await store.enqueue_many_rollouts([]) == []


async def thirty_takers_of_twenty(store: LightningStore) -> None:
    ids = await queued(store, *range(20))
    found = await asyncio.gather(*(store.dequeue_rollout(f"w-{i}") for i in range(30)))
    given = [one.rollout_id for one in found if one is not None]
    assert sorted(given) == sorted(ids)
    assert len(set(given)) == 20
    assert found.count(None) == 10


async def fifty_enqueue_at_the_same_time(store: LightningStore) -> None:
    made = await asyncio.gather(*(store.enqueue_rollout(i) for i in range(50)))
    ids = {one.rollout_id for one in made}
    assert len(ids) == 50
    found = await store.dequeue_many_rollouts(limit=60)
    assert {one.rollout_id for one in found} == ids
    assert sorted(one.input for one in found) == list(range(50))


async def a_blocking_taker_is_given_work_as_it_comes(
    store: LightningStore, elsewhere: LightningStore
) -> None:
    taker = asyncio.create_task(store.dequeue_rollout("w", wait_seconds=60))
    await asyncio.sleep(0.1)
    assert not taker.done()
    start = time.monotonic()
    rollout = await elsewhere.enqueue_rollout("work")
    found = await taker
    assert found is not None
    assert (found.rollout_id, found.attempt.worker_id) == (rollout.rollout_id, "w")
    assert time.monotonic() - start < 30


async def a_blocking_taker_gives_up_in_time(store: LightningStore) -> None:
    start = time.monotonic()
    assert await store.dequeue_rollout("w", wait_seconds=0.2) is None
    assert 0.15 < time.monotonic() - start < 10


async def takers_wait_in_their_order(store: LightningStore) -> None:
    takers = []
    for i in range(3):
        takers.append(asyncio.create_task(store.dequeue_rollout(f"w-{i}", wait_seconds=60)))
        await asyncio.sleep(0.1)
    ids = await queued(store, *range(3))
    found = await asyncio.gather(*takers)
    assert [one.rollout_id for one in found if one is not None] == ids
    await asyncio.gather(*(end_ok(store, one) for one in found if one is not None))
