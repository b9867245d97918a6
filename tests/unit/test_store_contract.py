"""Words of agent-lightning's queries as questions of ours, and the page of records that answers one in memory."""

from __future__ import annotations

import re
from typing import Any

import pytest

from agl_ray.store import contract
from agl_ray.store.journals.base import Condition
from agl_ray.types import InputError, PaginatedResult, Worker


def test_filters_become_conditions() -> None:
    query = contract.rollouts_query(
        status_in=["queuing", "queuing"],
        rollout_id_contains="ab",
        mode="val",
        filter_logic="or",
        sort_by="rollout_id",
        sort_order="desc",
        limit=5,
        offset=2,
    )
    assert query is not None
    assert query.must == (Condition("mode", ("val",)),)
    assert query.where == (Condition("status", ("queuing",)), Condition("key", contains="ab"))
    assert (query.any_of, query.order_by, query.descending) == (True, "key", True)
    assert (query.limit, query.offset, query.count) == (5, 2, True)


def test_no_filter_is_all_in_order_of_creation() -> None:
    query = contract.rollouts_query()
    assert query is not None
    assert (query.must, query.where, query.order_by) == ((), (), "created")
    assert contract.rollouts_query(status_in="failed") == contract.rollouts_query(
        status_in=["failed"]
    )


def test_a_choice_among_nothing_matches_nothing() -> None:
    assert contract.rollouts_query(status_in=[]) is None
    assert contract.rollouts_query(status_in=[], rollout_id_in=["ro"]) is None
    query = contract.rollouts_query(status_in=[], rollout_id_in=["ro"], filter_logic="or")
    assert query is not None
    assert query.where == (Condition("key", ("ro",)),)
    assert contract.select(None, [1, 2], getattr) == ([], 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sort_by": "colour"}, "sort_by: expected one of [.*'start_time'.*], got 'colour'"),
        ({"sort_order": "up"}, "sort_order: expected 'asc' or 'desc', got 'up'"),
        ({"filter_logic": "xor"}, "filter_logic: expected 'and' or 'or', got 'xor'"),
        ({"limit": -2}, "limit: .*-2"),
        ({"limit": 1.5}, "limit: .*1.5"),
        ({"offset": -1}, "offset: .*-1"),
        ({"status_in": ["asleep"]}, "status_in: expected some of [.*'queuing'.*], got 'asleep'"),
    ],
)
def test_what_is_wrong_is_named(given: dict[str, Any], message: str) -> None:
    pattern = message.replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(InputError, match=re.compile(pattern)):
        contract.rollouts_query(**given)


def test_a_page_of_records_in_memory() -> None:
    workers = [
        Worker(worker_id=name, status=status, last_busy_time=time)
        for name, status, time in [("a", "busy", 2.0), ("b", "idle", None), ("c", "busy", 1.0)]
    ]

    def page(**given: Any) -> tuple[list[str], int]:
        query = contract.workers_query(**given)
        found, total = contract.select(query, workers, getattr)
        return [one.worker_id for one in found], total

    assert page() == (["a", "b", "c"], 3)
    assert page(status_in=["busy"], limit=1) == (["a"], 2)
    assert page(sort_by="last_busy_time") == (["b", "c", "a"], 3)
    assert page(sort_by="last_busy_time", sort_order="desc") == (["a", "c", "b"], 3)
    assert page(limit=0) == ([], 3)
    assert page(offset=5) == ([], 3)


def test_a_page_is_a_sequence() -> None:
    page = PaginatedResult(["a", "b", "c"], limit=3, offset=6, total=10)
    assert (len(page), list(page), page[1], page[-2:]) == (3, ["a", "b", "c"], "b", ["b", "c"])
    assert "b" in page
    assert page.index("c") == 2
    assert list(reversed(page)) == ["c", "b", "a"]
    assert page == PaginatedResult(["a", "b", "c"], limit=3, offset=6, total=10)
    assert not PaginatedResult([], limit=-1, offset=0, total=0)
