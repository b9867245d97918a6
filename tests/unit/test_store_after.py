"""Pages that begin behind a record: over every way to reach the store, with the same cost and the same errors."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from http_store import served

from agl_ray.store import LightningStore, contract
from agl_ray.types import EnqueueRolloutRequest, InputError, NotFound, RolloutStatus


def test_what_may_be_named() -> None:
    def after(sort_by: str | None, value: Any, key: Any = "ro-1") -> Any:
        query = contract.rollouts_query(sort_by=sort_by, after=(value, key))
        assert query is not None
        return query.after

    assert after(None, None) == (None, "ro-1")
    assert after("start_time", 5) == (5, "ro-1")
    assert after("end_time", None) == (None, "ro-1")
    assert type(after("status", RolloutStatus.FAILED)[0]) is str
    for sort_by, value, key in (
        (None, 1, "ro-1"),
        ("start_time", "x", "ro-1"),
        ("start_time", True, "ro-1"),
        ("rollout_id", 1, "ro-1"),
        ("mode", "val", 1),
    ):
        with pytest.raises(InputError, match="after: expected"):
            after(sort_by, value, key)


def test_pages_of_rollouts_behind_one_another() -> None:
    async def pages(store: LightningStore) -> None:
        requests = [EnqueueRolloutRequest(input=one, rollout_id=f"ro-{-one}") for one in range(7)]
        await store.enqueue_many_rollouts(requests)
        seen: list[Any] = []
        after = None
        while page := await store.query_rollouts(limit=3, after=after, status_in=["queuing"]):
            assert page.total == 7
            seen += [one.input for one in page]
            after = (None, page[-1].rollout_id)
        assert seen == [*range(7)]
        back = await store.query_rollouts(limit=2, after=(None, "ro--4"), sort_order="desc")
        assert [one.input for one in back] == [3, 2]
        with pytest.raises(NotFound, match="ro-none"):
            await store.query_rollouts(after=(None, "ro-none"))

    for way in ("client", "local"):
        with served() as server:
            asyncio.run(pages(getattr(server, way)()))
