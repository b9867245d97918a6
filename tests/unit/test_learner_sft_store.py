"""Rejection sampling from a small recorded store: the best of each row, exact tokens, everything left out is counted."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from learner_data import call

from agl_ray.learner.sft_store import StoreRows, best_rollouts
from agl_ray.spans import span_batch
from agl_ray.store import LightningStore, StoreCore
from agl_ray.store.archive import open_archive
from agl_ray.types import EndReason, InputError

# input, mode, reward (None: the attempt fails), response
ROLLOUTS: list[tuple[str, str, float | None, list[int]]] = [
    ("q1", "train", 0.2, [11]),
    ("q1", "train", 0.9, [12]),
    ("q1", "train", 0.9, [13]),
    ("q1", "train", None, [14]),
    ("q2", "train", 0.1, [15]),
    ("q2", "train", 1.0, [16]),
    ("q2", "train", 1.0, [16]),
    ("q3", "val", 1.0, [17]),
]


async def record(url: str, rollouts: Any = ROLLOUTS) -> None:
    core = await StoreCore.open(url)
    store = LightningStore.local(core)
    for question, mode, reward, response in rollouts:
        started = await store.start_rollout({"question": question}, mode=mode)
        key = (started.rollout_id, started.attempt_id)
        rows = [
            call("a", [1, 2], response, attempt=key),
            call("b", [3], [20], attempt=key, parent="a", shared=2 + len(response)),
        ]
        await store.add_spans(*key, span_batch(rows))
        reason = EndReason.OK if reward is not None else EndReason.AGENT_ERROR
        await store.end_attempt(*key, reason, reward=reward)
    await core.close()


def chosen(url: str, **how: Any) -> StoreRows:
    async def read() -> StoreRows:
        async with open_archive(url) as archive:
            return await best_rollouts(archive, **how)

    return asyncio.run(read())


def rows_of(found: StoreRows) -> list[list[int]]:
    ends = found.rows.lengths.cumsum().tolist()
    lengths = found.rows.lengths.tolist()
    return [
        found.rows.ids[end - length : end].tolist()
        for end, length in zip(ends, lengths, strict=True)
    ]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = f"sqlite:///{tmp_path_factory.mktemp('store')}/store.db"
    asyncio.run(record(made))
    return made


def test_the_best_of_each_row_in_the_exact_tokens_of_its_calls(url: str) -> None:
    found = chosen(url, best=1)
    assert sorted(rows_of(found)) == [[1, 2, 12, 3, 20], [1, 2, 16, 3, 20]]
    assert (
        found.rows.weights.tolist() == [0, 0, 1, 0, 1] * 2
    )  # what the model sampled, nothing else
    assert not found.rows.columns
    assert found.counts == {"rollouts": 8, "validation": 1, "not_ok": 1, "not_best": 4}


def test_a_least_reward_and_equal_conversations(url: str) -> None:
    found = chosen(url, min_reward=0.9)
    assert sorted(row[2] for row in rows_of(found)) == [12, 13, 16]
    assert found.counts == {
        "rollouts": 8, "validation": 1, "not_ok": 1, "below_min_reward": 2, "duplicate_rows": 1
    }  # fmt: skip


def test_nothing_left_says_why(url: str) -> None:
    with pytest.raises(InputError, match="rollouts 8, below_min_reward 6, not_ok 1, validation 1"):
        chosen(url, min_reward=2.0)


def test_rollouts_without_tokens_of_their_own_model_are_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/store.db"
    asyncio.run(record(url, [("q1", "train", 1.0, [])]))

    async def without_ids() -> None:
        core = await StoreCore.open(url)
        store = LightningStore.local(core)
        started = await store.start_rollout({"question": "q2"}, mode="train")
        await store.end_attempt(started.rollout_id, started.attempt_id, EndReason.OK, reward=2.0)
        await core.close()

    asyncio.run(without_ids())
    with pytest.raises(InputError, match="tokens that its own model sampled"):
        chosen(url, min_reward=2.0)
