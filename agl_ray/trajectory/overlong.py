"""Rows that are too long, or that train nothing, and what becomes of them; everything counted.

Called by learner/prepare.py after the advantages are taken. Pure numpy; test it alone with tests/unit/test_trajectory_overlong.py.
"""

from __future__ import annotations

import numpy as np

from agl_ray.config.trajectory import TrajectoryConfig
from agl_ray.trajectory.ragged import Array, Rows


def fit(
    rows: Rows, most: int, config: TrajectoryConfig | None = None
) -> tuple[Rows, Array, dict[str, float]]:
    """The rows that stay, each of `most` tokens or fewer; int64 [R], which of `rows` they are; and the step's metrics.

    A longer row is left out (`trajectory.overlong: drop`), or keeps its first `most` tokens (`truncate`): the end is cut off, since
    without its beginning no token would be predicted from what the engine predicted it from. Then rows without a trained token go.
    """
    trained = _trained(rows)
    long = (trained > 0) & (rows.lengths > most)
    truncate = (config or TrajectoryConfig()).overlong == "truncate"
    cut = rows.head(most) if truncate else rows
    left = _trained(cut)
    stays = left > 0 if truncate else (trained > 0) & ~long
    kept = np.flatnonzero(stays)
    return (
        cut.take(kept),
        kept,
        {
            "rows_dropped_empty": float((trained == 0).sum()),
            "rows_dropped_overlong": float((long & ~stays).sum()),
            "rows_truncated": float((long & stays).sum()),
            "tokens_dropped_overlong": float((trained - left * stays)[long].sum()),
        },
    )


def _trained(rows: Rows) -> Array:
    return np.bincount(rows.row_of_token, weights=rows.weights, minlength=len(rows))
