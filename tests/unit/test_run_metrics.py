"""RunMetrics: the row of a step has what is always shown, validations have their step, writers' trouble reaches the person."""

from __future__ import annotations

import asyncio
from pathlib import Path

from actors.run_events import RunEvents
from actors.run_metrics import RunMetrics
from agl_ray.config import RunConfig
from agl_ray.ops.events import Notice, Validation
from agl_ray.ops.ledger import Evaluation, Ledger, RowResult
from agl_ray.ops.metrics import VALIDATION_FILE, read_metrics
from agl_ray.trajectory.batch import GroupPlan, Member, TrainBatch

CONFIG = RunConfig.model_validate(
    {"model": {"path": "."}, "data": {"train": "a.jsonl", "val": "a.jsonl"}}
)
LEARNED = {"loss": 0.5, "zero_signal_groups": 1.0, "tokens_of_batch": 40.0, "token_age.0": 40.0}


def batch() -> TrainBatch:
    groups = tuple(
        GroupPlan(
            group_id=f"g{i}",
            members=(Member(rollout_id=f"ro-{i}", attempt_id=f"at-{i}", reward=float(i)),),
        )
        for i in range(2)
    )
    return TrainBatch(step=1, groups=groups)


def evaluation(step: int) -> Evaluation:
    results = [
        RowResult(rollout_id="a", attempt_id="a", reward=1.0, end_reason="ok"),
        RowResult(rollout_id="b", attempt_id="b", reward=None, end_reason="timeout"),
    ]
    return Evaluation(step=step, results=results)


def test_rows_events_and_notices(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("no folder can be made here")

    async def main() -> tuple[Ledger, list[object]]:
        ledger = Ledger()
        said = RunEvents(lambda notice: ledger.note(notice.text, notice.restarted))
        metrics = RunMetrics(CONFIG, tmp_path, said, {})
        metrics.begin(0)
        await metrics.validated(evaluation(0))
        ledger.seconds = {"rollout": 3.0, "update": 1.0}
        sync = {"seconds": 0.5, "pause_seconds": 0.25}
        metrics.step(batch(), LEARNED, sync, ledger, {"rollout": 1.0}, {"lost": 1}, evaluation(1))
        await metrics.close(True)
        await metrics.close(False)
        return ledger, list(await said.since(0, 1.0))

    ledger, events = asyncio.run(main())
    (row,) = read_metrics(tmp_path)
    row.pop("writer_failures.tensorboard", None)  # there if the writer's thread was the faster one
    assert row == {
        "step": 1, "reward": 0.5, "groups": 2, "rollouts": 2, "dropped_groups": 0, **LEARNED, "sync_ms": 500.0,
        "pause_ms": 250.0, "weight_version": 1, "failures.lost": 1, "seconds_rollout": 2.0, "seconds_update": 1.0,
        "seconds_sync": 0.0, "seconds_validation": 0.0, "seconds_checkpoint": 0.0, "valid_groups": 1,
        "tokens_per_second": 40 / 3, "validation": 1.0,
    }  # fmt: skip
    (shown,) = read_metrics(tmp_path, VALIDATION_FILE)
    assert (shown["step"], shown["reward"], shown["rollouts"], shown["failures.timeout"]) == (0, 1, 1, 1)  # fmt: skip
    assert any(isinstance(event, Validation) and event.step == 0 for event in events)
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert notices == ledger.notices
    assert "tensorboard failed (FileExistsError" in notices[0]
    assert "misses 2 rows" in notices[1]


def test_the_ledger_knows_no_difference_before_a_token_was_compared() -> None:
    ledger, seen = Ledger(), []
    for step, row in enumerate([{}, {"max_logprob_diff": 2e-6}, {}, {"max_logprob_diff": 1e-6}], 1):
        ledger.take(row, step)
        seen.append(ledger.max_logprob_diff)
    assert seen == [None, 2e-6, 2e-6, 2e-6]
