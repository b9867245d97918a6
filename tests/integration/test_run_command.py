"""A whole run of an agent that is a program, under DAPO: groups without signal are replaced, counted and told, and no row is used twice."""

from __future__ import annotations

import asyncio
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from agl_ray.agents.command import COMMAND_SPAN
from agl_ray.ops.metrics import read_metrics
from agl_ray.store import LightningStore
from agl_ray.store.core import StoreCore
from agl_ray.trajectory.batch import TrainBatch
from agl_ray.types import EndReason, Rollout, from_json
from tests.faults.whole_run import REPO, WholeRun
from tests.integration.tiny_model import make

pytestmark = pytest.mark.slow

PROGRAM = REPO / "tests" / "integration" / "command_agent.py"


def number_of(rollout: Rollout) -> int:
    return int(re.findall(r"\d+", rollout.input["question"])[0])


def check_store(folder: Path, sampled: list[int]) -> None:
    """Every row once, in order; batches of rows with signal only; every attempt with what its program printed."""

    async def read() -> None:
        core = await StoreCore.open(f"sqlite:///{folder / 'store.db'}")
        store = LightningStore.local(core)
        rollouts = {r.rollout_id: r for r in (await store.query_rollouts(limit=-1)).items}
        mine = [r for r in rollouts.values() if r.mode == "train" and "step" in r.metadata]
        rows = Counter((r.metadata["step"], r.metadata["row"]) for r in mine)
        assert set(rows.values()) == {4}
        assert sorted(row for _, row in rows) == list(range(sum(sampled)))
        assert Counter(step for step, _ in rows) == dict(enumerate(sampled, 1))
        for step in (1, 2):
            body = await store.get_state(f"step/{step}")
            assert body is not None
            batch = from_json(body, TrainBatch)
            assert (batch.next_row, batch.open_rows) == (sum(sampled[:step]), ())
            for group in batch.groups:
                assert len({member.reward for member in group.members}) == 2
            for member in batch.members:
                assert number_of(rollouts[member.rollout_id]) % 2 == 1
                attempt = await store.get_attempt(member.rollout_id, member.attempt_id)
                assert (attempt.end_reason, attempt.reward) == (EndReason.OK, member.reward)
        await check_output(store, batch)
        await core.close()

    asyncio.run(read())


async def check_output(store: LightningStore, batch: TrainBatch) -> None:
    for member in batch.members:
        spans = await store.query_span_rows(member.rollout_id, member.attempt_id)
        (said,) = (span["attributes"] for span in spans if span["name"] == COMMAND_SPAN)
        assert said["stdout"]["tail"].startswith(f"step {batch.step}: asked about ")
        assert [span["kind"] for span in spans].count("call") == 1


def test_a_program_is_trained_on_groups_with_signal(tmp_path: Path) -> None:
    extra = [
        f"agent={{command: ['{sys.executable}', '{PROGRAM}']}}",
        *("algorithm.name=dapo", "train.steps=2", "validation.rows=4", "runners.num_runners=1"),
    ]
    run = WholeRun(tmp_path, make(tmp_path / "model"), extra).start()
    try:
        assert run.finish() == 0, run.text
    finally:
        run.close()
    assert run.left_over() == []
    metrics: list[dict[str, Any]] = read_metrics(run.run_folder)
    assert [row["step"] for row in metrics] == [1, 2]
    for row in metrics:
        assert (row["groups"], row["zero_signal_groups"], row["groups_short"]) == (4, 0, 0)
        assert row["groups_sampled"] == 4 + row["groups_refilled"]
        assert row["reward_sampled"] > row["reward"]  # what was left out was all right
        assert row["grad_norm"] > 0
    refilled = sum(int(row["groups_refilled"]) for row in metrics)
    assert run.summary["refilled_groups"] == refilled > 0
    assert any(f"groups 4/4+{int(row['groups_refilled'])}," in run.text for row in metrics)
    check_store(run.run_folder, [int(row["groups_sampled"]) for row in metrics])
