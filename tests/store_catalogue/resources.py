"""Snapshots of named resources."""

from __future__ import annotations

import re

import pytest

from agl_ray.store import LightningStore
from agl_ray.types import InputError, PromptTemplate
from store_catalogue.common import MODEL, OTHER


async def snapshots_have_ids_versions_and_times(store: LightningStore) -> None:
    assert await store.get_latest_resources() is None
    prompt = PromptTemplate(template="Say {word}")
    made = await store.add_resources({"main": MODEL, "prompt": prompt})
    assert re.fullmatch(r"rs-[0-9a-f]{12}", made.resources_id)
    assert made.version == 1
    assert made.create_time == made.update_time
    assert made.resources == {"main": MODEL, "prompt": prompt}
    assert await store.get_latest_resources() == made
    assert await store.get_resources_by_id(made.resources_id) == made
    assert await store.get_resources_by_id("rs-none") is None


async def an_update_is_the_next_version_and_the_latest(store: LightningStore) -> None:
    old = await store.add_resources({"main": MODEL})
    new = await store.add_resources({"main": OTHER})
    assert await store.get_latest_resources() == new
    updated = await store.update_resources(old.resources_id, {"main": OTHER})
    assert (updated.resources_id, updated.version) == (old.resources_id, 2)
    assert updated.create_time == old.create_time
    assert updated.update_time > old.update_time
    assert await store.get_latest_resources() == updated
    assert (await store.enqueue_rollout(1)).resources_id == old.resources_id
    other = await store.get_resources_by_id(new.resources_id)
    assert other is not None
    assert other.version == 1


async def an_update_of_an_unknown_id_creates_it(store: LightningStore) -> None:
    made = await store.update_resources("rs-chosen", {"main": MODEL})
    assert (made.resources_id, made.version) == ("rs-chosen", 1)
    assert await store.get_latest_resources() == made
    with pytest.raises(InputError, match="resources_id"):
        await store.update_resources("a/b", {"main": MODEL})


async def the_history_is_in_order(store: LightningStore) -> None:
    ids = [(await store.add_resources({"main": MODEL})).resources_id for _ in range(5)]
    await store.update_resources(ids[1], {"main": OTHER})
    listed = await store.query_resources()
    assert [one.resources_id for one in listed] == ids
    assert [one.version for one in listed] == [1, 2, 1, 1, 1]
    assert (listed.total, listed.limit, listed.offset) == (5, -1, 0)


async def snapshots_are_filtered_sorted_and_paged(store: LightningStore) -> None:
    for name in ("rs-a1", "rs-b1", "rs-a2", "rs-c1"):
        await store.update_resources(name, {"main": MODEL})
    await store.update_resources("rs-b1", {"main": OTHER})

    async def ids(**query: object) -> list[str]:
        return [one.resources_id for one in await store.query_resources(**query)]  # type: ignore[arg-type]

    assert await ids(resources_id="rs-a2") == ["rs-a2"]
    assert await ids(resources_id_contains="-a") == ["rs-a1", "rs-a2"]
    assert await ids(resources_id_contains="-a", resources_id="rs-a1") == ["rs-a1"]
    assert await ids(resources_id_contains="-a", resources_id="rs-b1") == []
    assert await ids(sort_by="resources_id") == ["rs-a1", "rs-a2", "rs-b1", "rs-c1"]
    assert await ids(sort_by="update_time", sort_order="desc", limit=1) == ["rs-b1"]
    assert await ids(sort_by="version", sort_order="desc", limit=1) == ["rs-b1"]
    assert await ids(limit=2, offset=1) == ["rs-b1", "rs-a2"]
    assert await ids(limit=0) == await ids(offset=9) == []
    with pytest.raises(InputError, match=r"sort_by.*create_time"):
        await ids(sort_by="colour")
