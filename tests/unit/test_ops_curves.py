"""curves.png: drawn from any honest metrics file, also from a short or partial one."""

from __future__ import annotations

from pathlib import Path

import pytest

from agl_ray.ops.curves import draw_curves
from agl_ray.ops.metrics import MetricsWriter

pytest.importorskip("matplotlib")


def rows(count: int) -> list[dict[str, float]]:
    made: list[dict[str, float]] = []
    for step in range(1, count + 1):
        row = {"step": step, "reward": 1 - 0.8 * 0.93**step, "tokens_of_batch": 4200 - 10 * step}
        row |= {
            "seconds_rollout": 3.1 + 0.1 * (step % 3),
            "seconds_update": 0.9,
            "seconds_sync": 0.05,
        }
        row |= {"max_logprob_diff": 3e-6 * (1 + step % 4)}
        if step % 10 == 0:
            row |= {"validation": 1 - 0.8 * 0.92**step, "seconds_checkpoint": 0.4}
        made.append(row)
    return made


VALIDATION = {
    "before": 0.2, "after": 0.965, "ci95_before": [0.158, 0.257], "ci95_after": [0.935, 0.981],
}  # fmt: skip


@pytest.mark.parametrize("count", [1, 45])
def test_a_run(tmp_path: Path, count: int) -> None:
    writer = MetricsWriter(tmp_path)
    for row in rows(count):
        writer.write(row)
    path = draw_curves(tmp_path, VALIDATION)
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_partial_file_and_none(tmp_path: Path) -> None:
    assert draw_curves(tmp_path) is None
    MetricsWriter(tmp_path).write({"step": 1, "reward": -3.5, "max_logprob_diff": 0.0})
    assert draw_curves(tmp_path) is not None


def test_rewards_of_what_the_batch_left_out(tmp_path: Path) -> None:
    """Dynamic sampling: a step may have no group with signal, and so no reward of its batch."""
    writer = MetricsWriter(tmp_path)
    for row in rows(3):
        writer.write(row | {"reward_sampled": 0.9} | ({"reward": None} if row["step"] == 2 else {}))
    assert draw_curves(tmp_path) is not None


def test_a_validation_that_did_not_take_place(tmp_path: Path) -> None:
    MetricsWriter(tmp_path).write(rows(1)[0])
    partial = {"before": 0.2, "ci95_before": [0.1, 0.3], "after": None, "ci95_after": None}
    assert draw_curves(tmp_path, partial) is not None
