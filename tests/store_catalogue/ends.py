"""Ends of rollouts and waiting for them."""

from __future__ import annotations

import asyncio
import time

import pytest

from agl_ray.store import LightningStore
from agl_ray.types import AttemptStatus, EndReason, InputError, NotFound, RolloutStatus
from store_catalogue.common import a_batch, a_span, end_ok, key_of, queued, status_of, taken


async def succeeded_and_failed_set_end_times(store: LightningStore) -> None:
    for status in ("succeeded", "failed"):
        attempt = await store.start_rollout(status)
        ended = await store.update_attempt(*key_of(attempt), status=AttemptStatus(status))
        rollout = await store.get_rollout_by_id(attempt.rollout_id)
        assert rollout is not None
        assert (ended.status, rollout.status) == (status, status)
        assert ended.end_time is not None
        assert rollout.end_time == ended.end_time >= rollout.start_time


async def a_reward_and_a_reason_are_kept(store: LightningStore) -> None:
    good, bad = await store.start_rollout(1), await store.start_rollout(2)
    ended = await end_ok(store, good, reward=0.25)
    assert (ended.end_reason, ended.reward) == (EndReason.OK, 0.25)
    ended = await store.end_attempt(*key_of(bad), EndReason.ENGINE_ERROR, error="it vanished")
    assert (ended.end_reason, ended.error) == (EndReason.ENGINE_ERROR, "it vanished")
    assert await store.get_attempt(*key_of(bad)) == ended
    assert await store.end_attempt(*key_of(bad), EndReason.ENGINE_ERROR) == ended


async def what_was_done_before_is_given_at_once(store: LightningStore) -> None:
    attempt = await store.start_rollout(1)
    await end_ok(store, attempt)
    start = time.monotonic()
    (found,) = await store.wait_for_rollouts(rollout_ids=[attempt.rollout_id], timeout=60)
    assert found.status is RolloutStatus.SUCCEEDED
    assert time.monotonic() - start < 30


async def what_is_done_during_the_wait_is_given_quickly(
    store: LightningStore, elsewhere: LightningStore
) -> None:
    attempt = await store.start_rollout(1)
    waits = [
        asyncio.create_task(elsewhere.wait_for_rollouts(rollout_ids=[attempt.rollout_id]))
        for _ in range(3)
    ]
    await asyncio.sleep(0.1)
    assert not any(one.done() for one in waits)
    start = time.monotonic()
    await end_ok(store, attempt)
    found = await asyncio.gather(*waits)
    assert [[one.rollout_id for one in rows] for rows in found] == [[attempt.rollout_id]] * 3
    assert time.monotonic() - start < 30


async def rollouts_that_end_at_different_times_are_all_given(store: LightningStore) -> None:
    ids = await queued(store, *range(4))
    wait = asyncio.create_task(store.wait_for_rollouts(rollout_ids=ids, timeout=60))
    for number in range(4):
        await asyncio.sleep(0.02)
        assert not wait.done()
        attempt = await taken(store)
        reason = EndReason.OK if number % 2 else EndReason.AGENT_ERROR
        await store.end_attempt(*key_of(attempt), reason, reward=1.0 if number % 2 else None)
    found = await wait
    assert sorted(one.rollout_id for one in found) == sorted(ids)
    assert {one.status for one in found} == {RolloutStatus.SUCCEEDED, RolloutStatus.FAILED}


async def at_the_timeout_the_finished_ones_are_given(store: LightningStore) -> None:
    ids = await queued(store, 1, 2)
    await end_ok(store, await taken(store))
    found = await store.wait_for_rollouts(rollout_ids=ids, timeout=0.2)
    assert [one.rollout_id for one in found] == ids[:1]


async def timeout_zero_looks_once(store: LightningStore) -> None:
    (rollout_id,) = await queued(store, 1)
    assert await store.wait_for_rollouts(rollout_ids=[rollout_id], timeout=0) == []
    await end_ok(store, await taken(store))
    assert len(await store.wait_for_rollouts(rollout_ids=[rollout_id], timeout=0)) == 1


async def no_timeout_waits_and_can_be_cancelled(store: LightningStore) -> None:
    (rollout_id,) = await queued(store, 1)
    wait = asyncio.create_task(store.wait_for_rollouts(rollout_ids=[rollout_id]))
    await asyncio.sleep(0.2)
    assert not wait.done()
    wait.cancel()
    with pytest.raises(asyncio.CancelledError):
        await wait
    assert await status_of(store, rollout_id) == "queuing"


async def unknown_ids_are_left_out(store: LightningStore) -> None:
    attempt = await store.start_rollout(1)
    await end_ok(store, attempt)
    ids = ["ro-none", attempt.rollout_id]
    found = await store.wait_for_rollouts(rollout_ids=ids, timeout=60)
    assert [one.rollout_id for one in found] == [attempt.rollout_id]
    assert await store.wait_for_rollouts(rollout_ids=["ro-none"]) == []
    assert await store.wait_for_rollouts(rollout_ids=[]) == []


async def a_wait_for_some_of_them_ends_with_those(store: LightningStore) -> None:
    ids = await queued(store, 1, 2, 3)
    wait = asyncio.create_task(store.wait_for_rollouts(rollout_ids=ids, min_count=2))
    await end_ok(store, await taken(store))
    await end_ok(store, await taken(store))
    assert len(await wait) == 2


async def spans_that_are_missing_at_the_end_are_waited_for(store: LightningStore) -> None:
    attempt = await store.start_rollout(1)
    await store.add_span(a_span(attempt, "a"))
    ending = asyncio.create_task(
        store.end_attempt(*key_of(attempt), EndReason.OK, reward=1.0, expected_spans=3)
    )
    await asyncio.sleep(0.05)
    await asyncio.gather(*(store.add_span(a_span(attempt, name)) for name in "bc"))
    ended = await ending
    assert (ended.end_reason, ended.num_spans) == (EndReason.OK, 3)
    again = await store.start_rollout(2)
    await store.add_span(a_span(again, "a"))
    ended = await store.end_attempt(*key_of(again), EndReason.OK, reward=1.0, expected_spans=1)
    assert ended.end_reason is EndReason.OK


async def the_last_spans_come_with_the_end(store: LightningStore) -> None:
    attempt = await store.start_rollout(1)
    key = key_of(attempt)
    await store.add_spans(*key, a_batch(attempt, "a"))
    last = {"spans": a_batch(attempt, "b", "c"), "batch_id": "last"}
    for _ in range(2):  # and a repetition stores nothing again
        ended = await store.end_attempt(*key, EndReason.OK, reward=1.0, expected_spans=3, **last)
        assert (ended.end_reason, ended.reward, ended.num_spans) == (EndReason.OK, 1.0, 3)
    table = await store.read_spans([key])
    assert table["span_id"].to_pylist() == ["a", "b", "c"]
    assert table["sequence_id"].to_pylist() == [1, 2, 3]


async def the_last_spans_of_an_attempt_that_was_ended_are_kept(store: LightningStore) -> None:
    attempt = await store.start_rollout(1)
    await store.cancel_rollouts([attempt.rollout_id])
    spans = a_batch(attempt, "late")
    ended = await store.end_attempt(*key_of(attempt), EndReason.OK, reward=1.0, spans=spans)
    assert (ended.end_reason, ended.num_spans) == (EndReason.CANCELLED, 1)
    assert (await store.read_spans([key_of(attempt)]))["span_id"].to_pylist() == ["late"]


async def an_end_that_is_refused_leaves_the_attempt_open(store: LightningStore) -> None:
    attempt = await store.start_rollout(1)
    key, spans = key_of(attempt), a_batch(attempt, "a")
    with pytest.raises(InputError, match="finite"):
        await store.end_attempt(
            *key, EndReason.OK, reward=float("nan"), spans=spans, batch_id="last"
        )
    with pytest.raises(InputError, match="attempt_id"):
        await store.end_attempt(key[0], "at-other", EndReason.OK, spans=spans)
    with pytest.raises(NotFound, match="at-other"):
        await store.end_attempt(key[0], "at-other", EndReason.OK)
    ended = await store.end_attempt(*key, EndReason.OK, spans=spans, batch_id="last")
    assert (ended.end_reason, ended.num_spans) == (EndReason.OK, 1)
