"""How rollouts come to be."""

from __future__ import annotations

import re
import time

import pytest

from agl_ray.store import LightningStore
from agl_ray.types import (
    AttemptedRollout,
    AttemptStatus,
    Conflict,
    EnqueueRolloutRequest,
    InputError,
    NotFound,
    RolloutConfig,
    RolloutStatus,
)
from store_catalogue.common import MODEL, OTHER, queued, taken


async def enqueued_rollouts_are_queuing(store: LightningStore) -> None:
    before = time.time()
    rollout = await store.enqueue_rollout({"task": "add"})
    assert re.fullmatch(r"ro-[0-9a-f]{12}", rollout.rollout_id)
    assert rollout.status is RolloutStatus.QUEUING
    assert rollout.input == {"task": "add"}
    assert before - 5 < rollout.start_time < time.time() + 5
    assert (rollout.end_time, rollout.mode, rollout.resources_id) == (None, None, None)
    assert rollout.config == RolloutConfig()
    assert await store.get_rollout_by_id(rollout.rollout_id) == rollout
    assert await store.get_latest_attempt(rollout.rollout_id) is None


async def started_rollouts_have_a_first_attempt(store: LightningStore) -> None:
    started = await store.start_rollout("now", mode="val", worker_id="w")
    assert isinstance(started, AttemptedRollout)
    assert re.fullmatch(r"at-[0-9a-f]{8}", started.attempt_id)
    assert (started.status, started.mode, started.input) == ("preparing", "val", "now")
    assert started.attempt.sequence_id == 1
    assert started.attempt.status is AttemptStatus.PREPARING
    assert started.attempt.worker_id == "w"
    assert await store.dequeue_rollout() is None


async def an_attempted_rollout_has_the_fields_of_its_rollout(store: LightningStore) -> None:
    config = RolloutConfig(max_attempts=2)
    started = await store.start_rollout(1, mode="test", config=config, metadata={"a": 1})
    rollout = started.rollout
    for name in ("rollout_id", "input", "start_time", "end_time", "mode", "resources_id"):
        assert getattr(started, name) == getattr(rollout, name)
    assert (started.status, started.config) == (rollout.status, config)
    assert started.metadata == {"a": 1}


async def config_and_metadata_are_kept(store: LightningStore) -> None:
    config = RolloutConfig(
        timeout_seconds=5.0,
        unresponsive_seconds=2.0,
        max_attempts=3,
        retry_condition=("failed", "timeout"),
    )
    metadata = {"row": 7, "tags": ["a", None], "deep": {"x": 1.5}}
    one = await store.enqueue_rollout(1, mode="train", config=config, metadata=metadata)
    two = await store.start_rollout(2, config=config, metadata=metadata)
    for rollout_id in (one.rollout_id, two.rollout_id):
        found = await store.get_rollout_by_id(rollout_id)
        assert found is not None
        assert (found.config, found.metadata) == (config, metadata)
    first = await taken(store)
    assert (first.mode, first.config, first.metadata) == ("train", config, metadata)


async def resources_default_to_the_latest_of_that_moment(store: LightningStore) -> None:
    before = await store.enqueue_rollout("before")
    first = await store.add_resources({"main": MODEL})
    between = await store.enqueue_rollout("between")
    second = await store.add_resources({"main": OTHER})
    after = await store.start_rollout("after")
    assert before.resources_id is None
    assert between.resources_id == first.resources_id
    assert after.resources_id == second.resources_id
    assert [(await taken(store)).resources_id for _ in "12"] == [None, first.resources_id]


async def named_resources_win(store: LightningStore) -> None:
    first = await store.add_resources({"main": MODEL})
    await store.add_resources({"main": OTHER})
    one = await store.enqueue_rollout(1, resources_id=first.resources_id)
    two = await store.start_rollout(2, resources_id=first.resources_id)
    assert one.resources_id == two.resources_id == first.resources_id


async def unknown_resources_are_refused_at_once(store: LightningStore) -> None:
    with pytest.raises(NotFound, match="rs-none"):
        await store.enqueue_rollout(1, resources_id="rs-none")
    with pytest.raises(ValueError, match="rs-none"):
        await store.start_rollout(1, resources_id="rs-none")
    requests = [EnqueueRolloutRequest(input=1)]
    requests.append(EnqueueRolloutRequest(input=2, resources_id="rs-none"))
    with pytest.raises(NotFound, match="rs-none"):
        await store.enqueue_many_rollouts(requests)
    assert list(await store.query_rollouts()) == []
    (rollout_id,) = await queued(store, "known")
    with pytest.raises(NotFound, match="rs-none"):
        await store.update_rollout(rollout_id, resources_id="rs-none")


async def inputs_are_any_json(store: LightningStore) -> None:
    inputs = [
        None,
        True,
        0,
        -1.5,
        "caf\u00e9 \U0001f600",
        [],
        {"a": [1, {"b": None}]},
        "x" * 100_000,
    ]
    ids = await queued(store, *inputs)
    found = [await store.get_rollout_by_id(one) for one in ids]
    assert [one.input for one in found if one is not None] == inputs
    with pytest.raises(InputError, match="input"):
        await store.enqueue_rollout(object())
    with pytest.raises(InputError, match="metadata"):
        await store.enqueue_rollout(1, metadata={"f": object()})


async def records_are_not_shared_by_reference(store: LightningStore) -> None:
    metadata, task = {"list": [1]}, {"words": ["a"]}
    rollout = await store.enqueue_rollout(task, metadata=metadata)
    metadata["list"].append(2)
    task["words"].append("b")
    found = await store.get_rollout_by_id(rollout.rollout_id)
    assert found is not None
    assert (found.input, found.metadata) == ({"words": ["a"]}, {"list": [1]})


async def a_chosen_id_makes_a_repetition_harmless(store: LightningStore) -> None:
    request = EnqueueRolloutRequest(input=1, rollout_id="ro-mine")
    first = await store.enqueue_many_rollouts([request])
    assert await store.enqueue_many_rollouts([request]) == first
    assert len(await store.query_rollouts()) == 1
    with pytest.raises(Conflict, match="ro-mine"):
        await store.enqueue_many_rollouts([EnqueueRolloutRequest(input=2, rollout_id="ro-mine")])
    with pytest.raises(InputError, match="rollout_id"):
        await store.enqueue_many_rollouts([EnqueueRolloutRequest(input=2, rollout_id="a/b")])
