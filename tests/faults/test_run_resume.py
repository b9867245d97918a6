"""A run that ended between the journal of a step and its training goes on with that very batch, and further."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agl_ray.ops.metrics import VALIDATION_FILE, read_metrics
from agl_ray.store import LightningStore
from agl_ray.store.core import StoreCore
from agl_ray.trajectory.batch import TrainBatch
from agl_ray.types import from_json, replace, to_json
from tests.faults.whole_run import WholeRun
from tests.integration.tiny_model import make

pytestmark = pytest.mark.slow


def journal_a_third_step(url: str) -> TrainBatch:
    """What a controller that dies right after the journal of step 3 leaves: here the attempts of step 2 once more."""

    async def write() -> TrainBatch:
        core = await StoreCore.open(url)
        store = LightningStore.local(core)
        body = await store.get_state("step/2")
        assert body is not None
        batch = replace(from_json(body, TrainBatch), step=3)
        await store.put_state("step/3", to_json(batch))
        await core.close()
        return batch

    return asyncio.run(write())


def steps_in(url: str) -> tuple[TrainBatch, Counter[int]]:
    """The journalled batch of step 3, and how many training rollouts were made for each step."""

    async def read() -> tuple[TrainBatch, Counter[int]]:
        core = await StoreCore.open(url)
        store = LightningStore.local(core)
        body = await store.get_state("step/3")
        assert body is not None
        rollouts = await store.query_rollouts()
        steps = [r.metadata["step"] for r in rollouts if r.mode == "train" and "step" in r.metadata]
        await core.close()
        return from_json(body, TrainBatch), Counter(steps)

    return asyncio.run(read())


def test_a_finished_run_goes_on_for_more_steps_and_takes_up_a_journalled_batch(
    tmp_path: Path,
) -> None:
    run = WholeRun(tmp_path, make(tmp_path / "model"), ["train.steps=2"]).start()
    try:
        assert run.finish() == 0, run.text
        first = run.summary
        url = f"sqlite:///{run.run_folder / 'store.db'}"
        batch = journal_a_third_step(url)
        run.extra.append("train.steps=4")
        run.start(resume=str(run.run_folder))
        assert run.finish() == 0, run.text
        assert run.left_over() == []
    finally:
        run.close()
    assert run.summary["updates"] == 4
    assert run.summary["validation"]["before"] == first["validation"]["before"]
    kept, steps = steps_in(url)
    assert kept == batch
    assert steps == {1: 16, 2: 16, 4: 16}  # nothing was rolled out for step 3
    assert [row["step"] for row in read_metrics(run.run_folder)] == [1, 2, 3, 4]
    assert [row["step"] for row in read_metrics(run.run_folder, VALIDATION_FILE)] == [0, 2, 4]
    # One run with every point once, in TensorBoard's own reading.
    shown = EventAccumulator(str(run.run_folder / "tensorboard"))
    shown.Reload()
    for name, steps in (("train/grad_norm", [1, 2, 3, 4]), ("val/reward", [0, 2, 4])):
        assert [point.step for point in shown.Scalars(name)] == steps
    rewards = [member.reward for member in batch.members]
    assert read_metrics(run.run_folder)[2]["reward"] == pytest.approx(sum(rewards) / len(rewards))
