"""metrics.jsonl: flat rows, cut on resume, torn lines left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from agl_ray.ops.metrics import (
    MetricsWriter,
    failures_of,
    read_metrics,
    tokens_per_second,
    valid_groups,
)


def test_rows_are_flat_and_in_order(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write({"step": 1, "reward": np.float32(0.5), "failures": {"timeout": 2}, "note": None})
    writer.write({"step": 2, "reward": 0.75})
    assert read_metrics(tmp_path) == [
        {"step": 1, "reward": 0.5, "failures.timeout": 2, "note": None},
        {"step": 2, "reward": 0.75},
    ]


def test_a_resumed_run_writes_its_steps_again(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    for step in range(1, 6):
        writer.write({"step": step})
    MetricsWriter(tmp_path).cut(3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    MetricsWriter(tmp_path / "empty").cut(0)


def test_a_torn_last_line_is_left_out_and_cut_mends_it(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write({"step": 1})
    with writer.path.open("ab") as file:
        file.write(b'{"step": 2, "rew')
    assert read_metrics(tmp_path) == [{"step": 1}]
    writer.cut(1)
    writer.write({"step": 2})
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]


def test_what_is_no_metric_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs 'step'"):
        MetricsWriter(tmp_path).write({"reward": 1})
    with pytest.raises(ValueError, match=r"metric a\.b: expected a number"):
        MetricsWriter(tmp_path).write({"step": 1, "a": {"b": [1]}})


def test_derived_numbers() -> None:
    row = {"tokens_of_batch": 400, "seconds_rollout": 3, "seconds_update": 1, "groups": 16}
    assert tokens_per_second(row) == 100
    assert tokens_per_second({"step": 1}) is None
    assert valid_groups({**row, "zero_signal_groups": 5}) == 11
    assert failures_of({"failures.timeout": 2, "failures.lost": 0}) == {"timeout": 2}
    assert failures_of({"failures": {"lost": 1}}) == {"lost": 1}
