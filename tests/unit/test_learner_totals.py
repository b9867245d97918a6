"""Metrics of a step: nothing is said of what was not seen."""

from __future__ import annotations

import math

from agl_ray.learner.totals import UNSEEN, said


def test_means_and_maxima_of_nothing_are_left_out() -> None:
    sums = {"loss": 0.0, "entropy": 6.0, "engine_kl": 0.0, "trained": 3.0, "current": 0.0}
    over = {"entropy": "trained", "engine_kl": "current"}
    maxima = {"age": 0.0, "diff": float(UNSEEN), "broken": math.nan}
    made = said(sums, maxima, over)
    assert math.isnan(made.pop("broken"))
    assert made == {"loss": 0.0, "entropy": 2.0, "trained": 3.0, "current": 0.0, "age": 0.0}
