"""Rows that are too long: left out, or cut at their end; every token that is lost is counted."""

from __future__ import annotations

import numpy as np
import pytest

from agl_ray.config.trajectory import TrajectoryConfig
from agl_ray.trajectory.overlong import fit
from agl_ray.trajectory.ragged import Rows

TRUNCATE = TrajectoryConfig(overlong="truncate")


def rows() -> Rows:
    """Four rows: 3 tokens; 6 tokens trained at both ends; 5 tokens trained only at its end; 4 tokens without a trained one."""
    return Rows.from_lists(
        [[1, 2, 3], [4, 5, 6, 7, 8, 9], [10, 11, 12, 13, 14], [15, 16, 17, 18]],
        [[0, 0, 1], [0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0]],
        place=[range(3), range(6), range(5), range(4)],
    )


def test_drop_leaves_out_whole_rows() -> None:
    left, kept, counts = fit(rows(), 4)
    assert kept.tolist() == [0]
    assert left.ids.tolist() == [1, 2, 3]
    assert counts == {
        "rows_dropped_empty": 1,
        "rows_dropped_overlong": 2,
        "rows_truncated": 0,
        "tokens_dropped_overlong": 5,
    }


def test_truncate_keeps_the_beginning_and_drops_what_then_trains_nothing() -> None:
    left, kept, counts = fit(rows(), 4, TRUNCATE)
    assert kept.tolist() == [0, 1]
    assert left.ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert left.weights.tolist() == [0, 0, 1, 0, 1, 1, 0]
    assert left.columns["place"].tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert counts == {
        "rows_dropped_empty": 1,
        "rows_dropped_overlong": 1,
        "rows_truncated": 1,
        "tokens_dropped_overlong": 3,
    }


@pytest.mark.parametrize("config", [None, TRUNCATE])
@pytest.mark.parametrize("most", [1, 2, 4, 5, 6, 100])
def test_no_token_is_lost_without_being_counted(config: TrajectoryConfig | None, most: int) -> None:
    left, kept, counts = fit(rows(), most, config)
    assert left.weights.sum() + counts["tokens_dropped_overlong"] == rows().weights.sum()
    assert len(kept) + counts["rows_dropped_empty"] + counts["rows_dropped_overlong"] == 4
    assert (left.lengths <= most).all()
    assert np.bincount(left.row_of_token, left.weights, len(left)).all()


def test_no_rows_at_all() -> None:
    left, kept, counts = fit(Rows.from_lists([], []), 3, TRUNCATE)
    assert (len(left), len(kept), set(counts.values())) == (0, 0, {0.0})
