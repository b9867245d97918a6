"""Reading spans: by attempt, by filters, in order, in pages."""

from __future__ import annotations

from typing import Any

import pytest

from agl_ray.store import LightningStore
from agl_ray.types import AttemptedRollout, InputError, NotFound
from store_catalogue.common import a_batch, a_span, key_of


async def _tree(store: LightningStore) -> tuple[AttemptedRollout, AttemptedRollout]:
    """Attempt 1: root > call-1, tool; attempt 2: call-2. Trace t1 and t2."""
    one = await store.start_rollout(1)
    two = await store.start_attempt(one.rollout_id)
    spans = [
        a_span(one, "root", trace_id="t1", start_time=5.0, end_time=9.0),
        a_span(one, "call-1", trace_id="t1", parent_id="root", start_time=7.0, end_time=8.0),
        a_span(one, "tool", trace_id="t1", parent_id="root", start_time=6.0, end_time=6.5),
        a_span(two, "call-2", trace_id="t2", start_time=1.0, end_time=2.0),
    ]
    for span in spans:
        await store.add_span(span)
    return one, two


async def by_attempt_and_latest(store: LightningStore) -> None:
    one, two = await _tree(store)

    async def names(*key: str) -> list[str]:
        return [span.name for span in await store.query_spans(*key)]

    assert await names(one.rollout_id) == ["root", "call-1", "tool", "call-2"]
    assert await names(*key_of(one)) == ["root", "call-1", "tool"]
    assert await names(one.rollout_id, "latest") == await names(*key_of(two)) == ["call-2"]


async def by_ids_names_and_their_parts(store: LightningStore) -> None:
    one, _ = await _tree(store)

    async def names(**query: Any) -> list[str]:
        return [span.name for span in await store.query_spans(one.rollout_id, **query)]

    assert await names(trace_id="t2") == ["call-2"]
    assert await names(trace_id_contains="t") == ["root", "call-1", "tool", "call-2"]
    assert await names(span_id="tool") == ["tool"]
    assert await names(span_id_contains="call") == ["call-1", "call-2"]
    assert await names(parent_id="root") == ["call-1", "tool"]
    assert await names(parent_id_contains="oo") == ["call-1", "tool"]
    assert await names(name="root") == ["root"]
    assert await names(name_contains="l-") == ["call-1", "call-2"]
    assert await names(name="none") == []
    assert await names(name_contains="call", trace_id="t1") == ["call-1"]


async def or_never_leaves_the_rollout_or_the_attempt(store: LightningStore) -> None:
    one, two = await _tree(store)
    await _tree(store)
    query: dict[str, Any] = {"name": "tool", "trace_id": "t2", "filter_logic": "or"}
    found = await store.query_spans(one.rollout_id, **query)
    assert [span.name for span in found] == ["tool", "call-2"]
    assert {span.rollout_id for span in found} == {one.rollout_id}
    found = await store.query_spans(*key_of(one), **query)
    assert [span.name for span in found] == ["tool"]
    found = await store.query_spans(two.rollout_id, "latest", **query)
    assert [span.name for span in found] == ["call-2"]


async def sorted_and_paged(store: LightningStore) -> None:
    one, _ = await _tree(store)

    async def names(**query: Any) -> list[str]:
        return [span.name for span in await store.query_spans(one.rollout_id, **query)]

    assert await names(sort_order="desc") == ["call-2", "tool", "call-1", "root"]
    assert await names(sort_by="start_time") == ["call-2", "root", "tool", "call-1"]
    assert await names(sort_by="end_time", sort_order="desc", limit=2) == ["root", "call-1"]
    assert await names(sort_by="name") == ["call-1", "call-2", "root", "tool"]
    assert await names(sort_by="parent_id") == ["root", "call-2", "call-1", "tool"]
    assert await names(limit=2, offset=1) == ["call-1", "tool"]
    assert await names(limit=0) == await names(offset=4) == []
    page = await store.query_spans(one.rollout_id, name_contains="call", limit=1)
    assert (len(page), page.total, page.limit, page.offset) == (1, 2, 1, 0)
    with pytest.raises(InputError, match=r"sort_by.*start_time.*'colour'"):
        await names(sort_by="colour")
    with pytest.raises(InputError, match="filter_logic"):
        await names(filter_logic="xor")
    with pytest.raises(InputError, match="limit"):
        await names(limit=-5)


async def columns_and_objects_are_the_same_spans(store: LightningStore) -> None:
    attempt = await store.start_rollout(1)
    key = key_of(attempt)
    await store.add_spans(*key, a_batch(attempt, "a", "b"))
    await store.add_span(a_span(attempt, "c", extra={"response_ids": [1, 2], "reward": 1.0}))
    table = await store.read_spans([key])
    assert table["span_id"].to_pylist() == ["a", "b", "c"]
    assert table["sequence_id"].to_pylist() == [1, 2, 3]
    assert table["response_ids"].to_pylist() == [None, None, [1, 2]]
    objects = await store.query_spans(*key)
    assert [one.span_id for one in objects] == ["a", "b", "c"]
    assert objects[2].extra == {"response_ids": [1, 2], "reward": 1.0}
    rows = await store.query_span_rows(*key)
    assert [row["sequence_id"] for row in rows] == [1, 2, 3]
    with pytest.raises(NotFound):
        await store.read_spans([("ro-none", "at-none")])


async def a_repeated_batch_is_stored_once(store: LightningStore) -> None:
    attempt = await store.start_rollout(1)
    batch = a_batch(attempt, "a", "b")
    assert await store.add_spans(*key_of(attempt), batch, batch_id="ba-1") == [1, 2]
    assert await store.add_spans(*key_of(attempt), batch, batch_id="ba-1") == [1, 2]
    assert len(await store.query_spans(attempt.rollout_id)) == 2
