"""Whole runs with learner.backend verl: its ranks in their own environment, real engines, and weights that arrive in them."""

from __future__ import annotations

from pathlib import Path

from agl_ray.ops.metrics import read_metrics
from tests.faults.whole_run import WholeRun
from tests.integration.tiny_model import make


def test_what_verl_trained_is_what_the_engine_speaks_with(environment: str, tmp_path: Path) -> None:
    extra = [
        *("learner.backend=verl", f"learner.verl_env={environment}", "learner.world_size=2"),
        *("learner.lr=0.01", "train.steps=2", "validation.rows=4", "runners.num_runners=1"),
    ]
    run = WholeRun(tmp_path, make(tmp_path / "model"), extra).start()
    try:
        assert run.finish(600) == 0, run.text
    finally:
        run.close()
    assert run.left_over() == []
    metrics = read_metrics(run.run_folder)
    assert [row["step"] for row in metrics] == [1, 2]
    for row in metrics:  # every token was made with the weights that it is trained from
        assert row["tokens_current"] == row["tokens_trained"] > 0
        assert row["max_logprob_diff"] < 1e-4
        assert row["grad_norm"] > 0
        assert row["pg_clipfrac"] == 0
    # Had the engine kept version 0, its log-probabilities of step 2 would be far away.
    assert run.summary["updates"] == 2


def test_a_missing_environment_is_said_before_anything_starts(tmp_path: Path) -> None:
    extra = ["learner.backend=verl", f"learner.verl_env={tmp_path / 'nowhere'}"]
    run = WholeRun(tmp_path, make(tmp_path / "model"), extra).start()
    try:
        assert run.finish(120) == 2
    finally:
        run.close()
    assert "learner.verl_env" in run.text
    assert "make venv-verl" in run.text
