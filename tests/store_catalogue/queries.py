"""Lists of rollouts and attempts: filters, order, pages, and what unknown ids give."""

from __future__ import annotations

from typing import Any

import pytest

from agl_ray.store import LightningStore
from agl_ray.types import (
    AttemptedRollout,
    EndReason,
    InputError,
    PaginatedResult,
    Rollout,
    RolloutConfig,
    RolloutStatus,
)
from store_catalogue.common import Restart, end_ok, key_of, queued, taken

QUEUING, FAILED, SUCCEEDED = (
    RolloutStatus.QUEUING,
    RolloutStatus.FAILED,
    RolloutStatus.SUCCEEDED,
)


async def _inputs(store: LightningStore, **query: Any) -> list[Any]:
    return [one.input for one in await store.query_rollouts(**query)]


async def _mixed(store: LightningStore) -> list[str]:
    """0 succeeded, 1 failed, 2 preparing, 3 and 4 queuing, 5 cancelled."""
    ids = await queued(store, *range(6))
    await end_ok(store, await taken(store))
    await store.end_attempt(*key_of(await taken(store)), EndReason.AGENT_ERROR)
    await taken(store)
    await store.cancel_rollouts([ids[5]])
    return ids


async def without_filters_all_in_order_of_creation(store: LightningStore) -> None:
    assert list(await store.query_rollouts()) == []
    await _mixed(store)
    page = await store.query_rollouts()
    assert isinstance(page, PaginatedResult)
    assert [one.input for one in page] == [0, 1, 2, 3, 4, 5]
    assert (page.limit, page.offset, page.total, len(page)) == (-1, 0, 6, 6)
    assert page[1].input == 1
    assert [one.input for one in page[-2:]] == [4, 5]


async def by_status(store: LightningStore) -> None:
    await _mixed(store)
    assert await _inputs(store, status_in=[QUEUING]) == [3, 4]
    assert await _inputs(store, status_in=["failed", "succeeded"]) == [0, 1]
    assert await _inputs(store, status_in=["running"]) == []
    assert await _inputs(store, status_in=[]) == []
    with pytest.raises(InputError, match=r"status_in.*requeuing.*sleeping"):
        await _inputs(store, status_in=["sleeping"])


async def by_id_and_part_of_id(store: LightningStore) -> None:
    ids = await _mixed(store)
    assert await _inputs(store, rollout_id_in=[ids[4], "ro-none", ids[1]]) == [1, 4]
    assert await _inputs(store, rollout_id_contains=ids[2][4:]) == [2]
    assert len(await store.query_rollouts(rollout_id_contains="ro-")) == 6
    assert await _inputs(store, rollout_id_contains="%") == []
    assert await _inputs(store, rollout_id_contains="RO-") == []
    assert await _inputs(store, rollout_id_in=[]) == []


async def filters_are_joined_by_and_or_or(store: LightningStore) -> None:
    ids = await _mixed(store)
    both = {"status_in": [QUEUING], "rollout_id_in": [ids[0], ids[3]]}
    assert await _inputs(store, **both) == [3]
    assert await _inputs(store, filter_logic="and", **both) == [3]
    assert await _inputs(store, filter_logic="or", **both) == [0, 3, 4]
    part = {"rollout_id_contains": ids[5][3:], "status_in": [FAILED]}
    assert await _inputs(store, **part) == []
    assert await _inputs(store, filter_logic="or", **part) == [1, 5]
    assert await _inputs(store, filter_logic="or", status_in=[], rollout_id_in=[ids[2]]) == [2]
    assert await _inputs(store, status_in=[], rollout_id_in=[ids[2]]) == []
    assert len(await store.query_rollouts(filter_logic="or")) == 6
    with pytest.raises(InputError, match=r"filter_logic.*'and' or 'or'.*'xor'"):
        await _inputs(store, filter_logic="xor")


async def new_names_beat_the_deprecated_ones(store: LightningStore) -> None:
    ids = await _mixed(store)
    assert await _inputs(store, status=[FAILED]) == [1]
    assert await _inputs(store, status=[FAILED], status_in=[SUCCEEDED]) == [0]
    assert await _inputs(store, rollout_ids=[ids[2]]) == [2]
    assert await _inputs(store, rollout_ids=[ids[2]], rollout_id_in=[ids[3]]) == [3]


async def by_mode(store: LightningStore) -> None:
    await queued(store, 1, 2, mode="train")
    await queued(store, 3, mode="val")
    await queued(store, 4)
    assert await _inputs(store, mode="train") == [1, 2]
    assert await _inputs(store, mode="val", filter_logic="or", status_in=[QUEUING]) == [3]


async def sorted_either_way(store: LightningStore) -> None:
    ids = await _mixed(store)
    by_id = sorted(range(6), key=lambda i: ids[i])
    assert await _inputs(store, sort_by="rollout_id") == by_id
    assert await _inputs(store, sort_by="rollout_id", sort_order="desc") == by_id[::-1]
    times = [one.start_time for one in await store.query_rollouts(sort_by="start_time")]
    assert times == sorted(times)
    ended = await _inputs(store, sort_by="end_time", sort_order="desc")
    assert ended[:3] == [5, 1, 0]
    assert set(await _inputs(store, sort_by="end_time", limit=3)) == {2, 3, 4}
    statuses = [one.status for one in await store.query_rollouts(sort_by="status")]
    assert statuses == sorted(statuses)
    with pytest.raises(InputError, match=r"sort_by.*end_time.*'colour'"):
        await _inputs(store, sort_by="colour")
    with pytest.raises(InputError, match=r"sort_order.*'asc' or 'desc'.*'up'"):
        await _inputs(store, sort_order="up")


async def cut_into_pages(store: LightningStore) -> None:
    await queued(store, *range(10))
    page = await store.query_rollouts(limit=3, offset=2)
    assert [one.input for one in page] == [2, 3, 4]
    assert (page.total, page.limit, page.offset) == (10, 3, 2)
    assert await _inputs(store, limit=3, offset=8) == [8, 9]
    beyond = await store.query_rollouts(limit=3, offset=50)
    assert (list(beyond), beyond.total) == ([], 10)
    nothing = await store.query_rollouts(limit=0, status_in=[QUEUING])
    assert (list(nothing), nothing.total) == ([], 10)
    assert await _inputs(store, offset=7) == [7, 8, 9]
    found = await _inputs(store, sort_by="rollout_id", limit=4)
    found += await _inputs(store, sort_by="rollout_id", limit=4, offset=4)
    found += await _inputs(store, sort_by="rollout_id", limit=4, offset=8)
    assert sorted(found) == list(range(10))
    for wrong in ({"limit": -2}, {"offset": -1}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            await _inputs(store, **wrong)


async def pages_by_number_when_some_are_forgotten(store: LightningStore) -> None:
    ids = await queued(store, *range(8))
    assert await _inputs(store, limit=2, offset=3) == [3, 4]
    await store.cancel_rollouts([ids[2], ids[7]])
    await store.forget_rollouts([ids[2]])
    assert await _inputs(store, limit=2, offset=3) == [4, 5]
    await store.forget_rollouts([ids[7]])
    assert await _inputs(store, limit=9, offset=4) == [5, 6]
    ids += await queued(store, 8)
    assert await _inputs(store, limit=3, offset=4) == [5, 6, 8]


async def mode_and_status_are_counted_as_they_change(
    store: LightningStore, restart: Restart
) -> None:
    ids = [*await queued(store, 0, 1, 2, mode="train"), *await queued(store, 3, mode="val")]
    await queued(store, 4)

    async def counted(store: LightningStore) -> list[int | None]:
        asked: list[dict[str, Any]] = [
            {"mode": "train"},
            {"mode": "val"},
            {"mode": "none"},
            {"mode": "train", "status_in": ["queuing"]},
            {"mode": "train", "status_in": ["cancelled", "running"]},
        ]
        return [(await store.query_rollouts(limit=1, **one)).total for one in asked]

    assert await counted(store) == [3, 1, 0, 3, 0]
    await store.cancel_rollouts([ids[0], ids[3]])
    await store.update_rollout(ids[1], mode="val")
    assert await counted(store) == [2, 2, 0, 1, 1]
    await store.forget_rollouts([ids[0]])
    assert await counted(store) == [1, 2, 0, 1, 0]
    assert await counted(await restart()) == [1, 2, 0, 1, 0]


async def rollouts_carry_their_latest_attempt(store: LightningStore) -> None:
    config = RolloutConfig(max_attempts=2, retry_condition=("failed",))
    await queued(store, "twice", "never", config=config)
    first = await taken(store)
    await store.end_attempt(*key_of(first), EndReason.AGENT_ERROR)
    await store.start_attempt(first.rollout_id)
    twice, never = await store.query_rollouts()
    assert isinstance(twice, AttemptedRollout)
    assert twice.attempt == await store.get_latest_attempt(first.rollout_id)
    assert twice.attempt.sequence_id == 2
    assert isinstance(never, Rollout)
    assert never.rollout_id != twice.rollout_id


async def lists_show_what_was_done_just_before(store: LightningStore) -> None:
    for number in range(5):
        attempt = await store.start_rollout(number)
        (found,) = await store.query_rollouts(status_in=["preparing"])
        assert found.rollout_id == attempt.rollout_id
        await end_ok(store, attempt)
        assert len(await store.query_rollouts(status_in=["succeeded"])) == number + 1


async def attempts_are_sorted_and_paged(store: LightningStore) -> None:
    first = await store.start_rollout(1)
    ids = [first.attempt_id]
    for _ in range(3):
        ids.append((await store.start_attempt(first.rollout_id)).attempt_id)

    async def found(**query: Any) -> list[str]:
        return [one.attempt_id for one in await store.query_attempts(first.rollout_id, **query)]

    assert await found() == ids
    assert await found(sort_order="desc") == ids[::-1]
    assert await found(sort_by="attempt_id") == sorted(ids)
    assert await found(limit=2, offset=1) == ids[1:3]
    assert await found(limit=0) == await found(offset=4) == []
    page = await store.query_attempts(first.rollout_id, limit=1)
    assert (len(page), page.total) == (1, 4)
    with pytest.raises(InputError, match=r"sort_by.*sequence_id"):
        await found(sort_by="colour")


async def unknown_ids_read_as_nothing(store: LightningStore) -> None:
    assert await store.get_rollout_by_id("ro-none") is None
    assert await store.get_latest_attempt("ro-none") is None
    assert list(await store.query_attempts("ro-none")) == []
    assert list(await store.query_spans("ro-none")) == []
    assert list(await store.query_spans("ro-none", "latest")) == []
    attempt = await store.start_rollout(1)
    assert list(await store.query_spans(attempt.rollout_id, "at-none")) == []
    (waiting,) = await queued(store, 2)
    assert list(await store.query_attempts(waiting)) == []
    assert list(await store.query_spans(waiting, "latest")) == []


async def statistics_count(store: LightningStore) -> None:
    await store.add_resources({})
    await _mixed(store)
    attempt = await store.start_rollout("x", worker_id="w")
    await store.get_next_span_sequence_id(*key_of(attempt))
    counts = await store.statistics()
    assert counts["name"] == "LightningStore"
    assert (counts["total_rollouts"], counts["total_attempts"]) == (7, 4)
    assert (counts["total_spans"], counts["total_resources"], counts["total_workers"]) == (0, 1, 1)
    assert counts["uptime"] >= 0
    assert counts["rollouts_by_status"]["queuing"] == counts["queue"] == 2


async def capabilities_are_told(store: LightningStore) -> None:
    told = store.capabilities
    assert told["thread_safe"]
    assert told["async_safe"]
    assert told["otlp_traces"] is (store.otlp_traces_endpoint() is not None)
