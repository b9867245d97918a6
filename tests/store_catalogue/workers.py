"""Workers: known from their first contact, busy and idle with their attempts."""

from __future__ import annotations

import pytest

from agl_ray.store import LightningStore
from agl_ray.types import AttemptStatus, EndReason, InputError, Worker
from store_catalogue.common import end_ok, key_of, queued, taken


async def _worker(store: LightningStore, worker_id: str = "w") -> Worker:
    found = await store.get_worker_by_id(worker_id)
    assert found is not None
    return found


async def workers_appear_at_first_contact(store: LightningStore) -> None:
    assert await store.get_worker_by_id("w") is None
    assert list(await store.query_workers()) == []
    worker = await store.update_worker("w", {"cpu": 0.5})
    assert (worker.status, worker.heartbeat_stats) == ("unknown", {"cpu": 0.5})
    assert worker.last_heartbeat_time is not None
    assert await store.get_worker_by_id("w") == worker
    await store.dequeue_rollout("hungry")
    assert (await _worker(store, "hungry")).status == "idle"
    assert [one.worker_id for one in await store.query_workers()] == ["hungry", "w"]


async def taking_and_starting_assign_workers(store: LightningStore) -> None:
    (rollout_id,) = await queued(store, 1)
    one = await taken(store, "taker")
    two = await store.start_rollout(2, worker_id="starter")
    await store.end_attempt(*key_of(one), EndReason.AGENT_ERROR)
    await store.update_rollout(rollout_id, status="requeuing")  # type: ignore[arg-type]
    three = await store.start_attempt(rollout_id, worker_id="again")
    for worker_id, attempt in (("starter", two), ("again", three)):
        worker = await _worker(store, worker_id)
        assert worker.status == "busy"
        assert (worker.current_rollout_id, worker.current_attempt_id) == key_of(attempt)
        assert worker.last_busy_time is not None
    free = await _worker(store, "taker")
    assert (free.status, free.current_rollout_id) == ("idle", None)
    assert free.last_dequeue_time is not None


async def a_heartbeat_keeps_the_other_fields(store: LightningStore) -> None:
    attempt = await store.start_rollout(1, worker_id="w")
    before = await _worker(store)
    after = await store.update_worker("w", {"open": 1})
    assert (after.status, after.current_attempt_id) == ("busy", attempt.attempt_id)
    assert after.last_busy_time == before.last_busy_time
    kept = await store.update_worker("w")
    assert kept.heartbeat_stats == {"open": 1}
    with pytest.raises(InputError, match="heartbeat_stats"):
        await store.update_worker("w", None)  # type: ignore[arg-type]


async def workers_follow_their_attempts(store: LightningStore) -> None:
    expected = {"succeeded": "idle", "failed": "idle", "timeout": "unknown"}
    expected |= {"unresponsive": "unknown", "running": "busy"}
    for status, worker_status in expected.items():
        attempt = await store.start_rollout(1, worker_id=status)
        assert (await _worker(store, status)).status == "busy"
        await store.update_attempt(*key_of(attempt), status=AttemptStatus(status))
        assert (await _worker(store, status)).status == worker_status, status
    assert (await _worker(store, "running")).current_rollout_id is not None
    assert (await _worker(store, "timeout")).current_rollout_id is None


async def an_empty_queue_makes_idle_unless_there_is_work(store: LightningStore) -> None:
    attempt = await store.start_rollout(1, worker_id="w")
    assert await store.dequeue_rollout("w") is None
    assert (await _worker(store)).status == "busy"
    await end_ok(store, attempt)
    assert (await _worker(store)).status == "idle"
    assert (await _worker(store)).last_idle_time is not None


async def an_attempt_can_change_hands(store: LightningStore) -> None:
    attempt = await store.start_rollout(1, worker_id="old")
    await store.update_attempt(*key_of(attempt), worker_id="new")
    assert (await _worker(store, "old")).status == "idle"
    assert (await _worker(store, "new")).current_attempt_id == attempt.attempt_id


async def workers_are_filtered_sorted_and_paged(store: LightningStore) -> None:
    for name in ("a-1", "a-2", "b-1", "b-2"):
        await store.update_worker(name)
    await store.start_rollout(1, worker_id="a-2")
    await store.dequeue_rollout("b-1")

    async def ids(**query: object) -> list[str]:
        return [one.worker_id for one in await store.query_workers(**query)]  # type: ignore[arg-type]

    assert await ids(status_in=["busy"]) == ["a-2"]
    assert await ids(status_in=["busy", "idle"]) == ["a-2", "b-1"]
    assert await ids(worker_id_contains="b-") == ["b-1", "b-2"]
    assert await ids(status_in=["idle"], worker_id_contains="b-") == ["b-1"]
    found = await ids(status_in=["busy"], worker_id_contains="b-", filter_logic="or")
    assert found == ["a-2", "b-1", "b-2"]
    assert await ids(sort_by="worker_id", sort_order="desc", limit=2) == ["b-2", "b-1"]
    assert await ids(sort_by="last_heartbeat_time") == ["a-1", "a-2", "b-1", "b-2"]
    assert await ids(limit=2, offset=1) == ["a-2", "b-1"]
    assert await ids(limit=0) == await ids(status_in=[]) == []
    page = await store.query_workers(worker_id_contains="b-", limit=1)
    assert (len(page), page.total) == (1, 2)
    with pytest.raises(InputError, match=r"sort_by.*last_busy_time"):
        await ids(sort_by="colour")
    with pytest.raises(InputError, match=r"status_in.*busy"):
        await ids(status_in=["asleep"])
    with pytest.raises(InputError, match="filter_logic"):
        await ids(filter_logic="xor")
