"""Batches out of a real store, with runners that end rollouts at once: groups without signal are replaced, and no row is lost or used twice."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from actors.batch_feeder import BatchFeeder
from actors.rollout_groups import GroupRollouts
from actors.run_events import RunEvents
from agl_ray.config import RunConfig
from agl_ray.ops.events import Notice
from agl_ray.schedule import RowPositions
from agl_ray.store import LightningStore, StoreCore
from agl_ray.trajectory.batch import TrainBatch
from agl_ray.types import LLM, EndReason

ROWS = 40


def config(*, steps: int = 3, staleness: int = 0, **algorithm: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": "unused"},
            "data": {"train": "unused", "val": "unused"},
            "rollout": {"groups_per_step": 4, "group_size": 3},
            "algorithm": algorithm,
            "train": {"steps": steps, "staleness": staleness},
        }
    )


def reward_of(row: dict[str, Any], member: int) -> float:
    """Two rows of three are all right or all wrong, whoever tries."""
    kind = zlib.crc32(str(row["id"]).encode()) % 3
    return float(member % 2) if kind == 2 else float(kind)


class Sitting:
    """One sitting of a run: feeds from `positions` on, and keeps what a controller would journal."""

    def __init__(self, settings: RunConfig, store: LightningStore) -> None:
        self.settings, self.store = settings, store
        self.notices: list[Notice] = []

    async def __call__(
        self, positions: RowPositions, first: int, last: int, resources: str
    ) -> list[TrainBatch]:
        groups = GroupRollouts(
            self.settings,
            self.store,
            [{"id": i} for i in range(ROWS)],
            resources,
            positions=positions,
        )
        said = RunEvents(self.notices.append)
        batches = []
        async with BatchFeeder(self.settings, groups, said, first_batch=first) as feeder:
            for step in range(first + 1, last + 1):
                batches.append(await feeder.next_batch(step))
                await feeder.advance(step)
            await asyncio.sleep(0.02)  # slots of later steps are open where the window lets them
        return batches


async def runner(store: LightningStore, reward: Callable[[dict[str, Any], int], float]) -> None:
    while True:
        for taken in await store.dequeue_many_rollouts(limit=8, wait_seconds=10):
            member = taken.rollout.metadata["group_index"]
            await store.end_attempt(
                taken.rollout.rollout_id,
                taken.attempt.attempt_id,
                EndReason.OK,
                reward=reward(taken.rollout.input, member),
                expected_spans=0,
            )


def with_store(
    work: Callable[[LightningStore, str], Awaitable[None]],
    reward: Callable[[dict[str, Any], int], float] = reward_of,
) -> None:
    async def main() -> None:
        core = await StoreCore.open("memory://")
        store = LightningStore.local(core)
        resources = await store.add_resources(
            {"main_llm": LLM(endpoint="http://127.0.0.1:9", model="m")}
        )
        working = asyncio.ensure_future(runner(store, reward))
        try:
            await work(store, resources.resources_id)
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            await core.close()

    asyncio.run(main())


def share_with_signal(batches: list[TrainBatch]) -> float:
    groups = [group for batch in batches for group in batch.groups]
    return sum(len({m.reward for m in group.members}) > 1 for group in groups) / len(groups)


def rows_of(batch: TrainBatch) -> list[int]:
    return [int(group.group_id.partition("-")[2]) for group in batch.groups]


def test_dynamic_sampling_raises_the_share_of_groups_with_signal() -> None:
    async def work(store: LightningStore, resources: str) -> None:
        kept = await Sitting(config(name="grpo"), store)(RowPositions(), 0, 3, resources)
        assert share_with_signal(kept) < 0.6
        assert kept[0].sampled == {}
        refilled = await Sitting(config(name="dapo"), store)(RowPositions(), 0, 3, resources)
        assert share_with_signal(refilled) == 1.0
        for batch in refilled:
            assert len(batch.groups) == 4
            sampled = batch.sampled
            assert sampled["groups_sampled"] == 4 + sampled["groups_refilled"]
            assert sampled["groups_short"] == 0
            assert batch.metrics["groups_refilled"] == sampled["groups_refilled"] > 0
            assert rows_of(batch) == sorted(rows_of(batch))
        handed_out = sum(batch.sampled["groups_sampled"] for batch in refilled)
        assert (refilled[-1].next_row, refilled[-1].open_rows) == (handed_out, ())

    with_store(work)


def test_a_step_without_enough_groups_goes_on_with_fewer_and_says_so_once() -> None:
    async def work(store: LightningStore, resources: str) -> None:
        sitting = Sitting(config(name="dapo", refill_batches=0.5), store)
        batches = await sitting(RowPositions(), 0, 3, resources)
        for batch in batches:
            assert batch.groups == ()
            assert batch.sampled["groups_refilled"] == 2
            assert batch.sampled["groups_short"] == 4
            assert batch.metrics["reward"] is None
            assert batch.metrics["reward_sampled"] == 1.0
            assert await store.get_attempts([m.rollout_id for m in batch.members]) == []
            assert (await store.read_spans(batch.attempts)).num_rows == 0  # as the learner reads it
        (notice,) = sitting.notices
        assert notice.text.startswith("step 1: 0 of 4 groups have signal after 2 further ones")

    with_store(work, lambda row, member: 1.0)


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_a_run_that_is_killed_between_steps_uses_every_row_once(staleness: int, name: str) -> None:
    enough = {"refill_batches": 20.0} if name == "dapo" else {}
    settings = config(steps=6, staleness=staleness, name=name, **enough)

    async def work(store: LightningStore, resources: str) -> None:
        whole = await Sitting(settings, store)(RowPositions(), 0, 6, resources)
        first = await Sitting(settings, store)(RowPositions(), 0, 2, resources)
        journal = first[-1]
        assert bool(journal.open_rows) == bool(staleness)
        positions = RowPositions(journal.next_row, journal.open_rows)
        second = await Sitting(settings, store)(positions, 2, 6, resources)
        if staleness == 0:
            assert [rows_of(b) for b in first + second] == [rows_of(b) for b in whole]
        trained = [row for batch in first + second for row in rows_of(batch)]
        assert len(trained) == len(set(trained)) == 24
        if name == "grpo":
            assert sorted(trained) == list(range(24))
        else:
            sampled = sum(int(b.sampled["groups_sampled"]) for b in first + second)
            assert (positions.next_row, positions.open_rows) == (sampled, ())

    with_store(work)
