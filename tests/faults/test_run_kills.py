"""kill -9 of each kind of process during a real run: it completes, nothing acknowledged is lost, the summary says what happened."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agl_ray.store import LightningStore
from agl_ray.store.core import StoreCore
from agl_ray.trajectory.batch import TrainBatch
from agl_ray.types import EndReason, from_json
from tests.faults.whole_run import WholeRun
from tests.integration.tiny_model import make

pytestmark = pytest.mark.slow

STEPS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def killed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeRun]:
    """A finished run in which every kind of process but the controller was killed, one after the other."""
    run = WholeRun(tmp_path_factory.mktemp("killed"), model).start()
    try:
        run.until(r"step 1/8")
        run.kill("ray::Runner")
        run.until(r"step 2/8")
        run.kill("ray::Store")
        run.until(r"step 4/8")  # the last checkpoint is of step 3
        run.kill("ray::LearnerRank")
        run.until(r"step 5/8")
        run.kill("ServeReplica:agl_ray:Engine")
        run.until(r"step 6/8")
        run.kill("ServeReplica:agl_ray:Gateway")
        run.until(r"step 7/8")
        run.kill("ray::WeightSync")
        assert run.finish() == 0, run.text
        yield run
    finally:
        run.close()


def test_the_run_completes_and_says_what_happened(killed: WholeRun) -> None:
    summary = killed.summary
    assert summary["updates"] == STEPS
    assert summary["weight_versions"] == STEPS + 1
    killed_once = ("runner", "learner", "engine", "gateway", "store", "weight_sync")
    assert summary["restarts"] == {**dict.fromkeys(killed_once, 1), "controller": 0}
    told = " ".join(summary["events"])
    for word in ("runner-", "learner", "engine", "gateway", "the store", "weight sync"):
        assert word in told, summary["events"]
    assert summary["attempts"]["ok"] >= STEPS * 16 + 2 * 8
    assert summary["max_logprob_diff"] <= 1e-3


def test_nothing_acknowledged_is_lost(killed: WholeRun) -> None:
    """Every attempt that a step was trained on is in the journal, ended ok with its reward, its calls and its reward span."""

    async def check() -> None:
        core = await StoreCore.open(f"sqlite:///{killed.run_folder / 'store.db'}")
        store = LightningStore.local(core)
        for step in range(1, STEPS + 1):
            body = await store.get_state(f"step/{step}")
            assert body is not None
            batch = from_json(body, TrainBatch)
            assert len(batch.members) >= 4 * 2
            for member in batch.members:
                attempt = await store.get_attempt(member.rollout_id, member.attempt_id)
                assert attempt.end_reason is EndReason.OK
                assert attempt.reward == member.reward
                spans = await store.query_span_rows(member.rollout_id, member.attempt_id)
                check_spans(attempt.num_spans, member.reward, spans)
        await core.close()

    asyncio.run(check())


def check_spans(expected: int, reward: float, spans: list[dict[str, Any]]) -> None:
    assert len(spans) == expected
    assert len({span["span_id"] for span in spans}) == expected  # none twice
    assert [span["reward"] for span in spans if span["kind"] == "reward"] == [reward]
    assert any(span["kind"] == "call" for span in spans)


def check_rows(folder: Path, steps: int) -> None:
    """Every row that was handed out was trained once, or had no signal, and none was lost with what was in flight."""

    async def check() -> None:
        core = await StoreCore.open(f"sqlite:///{folder / 'store.db'}")
        store = LightningStore.local(core)
        bodies = [await store.get_state(f"step/{step}") for step in range(1, steps + 1)]
        batches = [from_json(body, TrainBatch) for body in bodies if body is not None]
        assert len(batches) == steps
        rollouts = [r for r in await store.query_rollouts(limit=-1) if r.mode == "train"]
        rows = {r.rollout_id: r.metadata["row"] for r in rollouts if "step" in r.metadata}
        trained = [rows[group.members[0].rollout_id] for one in batches for group in one.groups]
        assert len(trained) == len(set(trained))
        assert batches[-1].open_rows == ()
        handed_out = set(range(batches[-1].next_row))
        assert set(rows.values()) == handed_out
        reward_of = {a.rollout_id: a.reward for a in await store.get_attempts(list(rows))}
        ordered = sorted(rollouts, key=lambda r: r.start_time)
        for row in handed_out - set(trained):
            last = [r.rollout_id for r in ordered if rows.get(r.rollout_id) == row][-4:]
            assert len({reward_of[name] for name in last}) == 1, row
        await core.close()

    asyncio.run(check())


def test_a_killed_controller_goes_on_from_the_stores_position(model: Path, tmp_path: Path) -> None:
    extra = ["train.steps=5", "train.staleness=1", "algorithm.name=dapo"]
    run = WholeRun(tmp_path, model, extra).start()
    try:
        run.until(r"step 2/5")
        run.kill("ray::Controller")
        assert run.finish() == 0, run.text
        assert "the controller died" in run.text
        assert run.summary["updates"] == 5
        assert run.summary["restarts"]["controller"] == 1
        assert run.text.count("validation before training") == 1
        check_rows(run.run_folder, 5)
        assert run.left_over() == []
    finally:
        run.close()


def test_no_process_is_left(killed: WholeRun) -> None:
    assert killed.left_over() == []


@pytest.mark.parametrize("moment", ["starting learner", r"step 2/8"])
def test_an_interrupted_run_ends_soon_leaves_nothing_and_goes_on(
    model: Path, tmp_path: Path, moment: str
) -> None:
    run = WholeRun(tmp_path, model, ["train.steps=8"]).start()
    try:
        run.until(moment)
        run.interrupt()
        assert run.finish(seconds=60) == 1, run.text
        assert run.left_over() == []
        assert "--resume" in run.text
        if moment == "starting learner":
            return
        run.start(resume=str(run.run_folder))
        assert run.finish() == 0, run.text
        assert "step 2/8" not in run.text.split("interrupted")[1]  # it was not trained again
        assert run.summary["updates"] == STEPS
    finally:
        run.close()
