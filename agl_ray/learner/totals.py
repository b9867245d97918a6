"""What a step's sums and maxima over tokens become as metrics: nothing is said of what was not seen.

Called by learner/step.py and learner/verl_metrics.py. Test it alone with tests/unit/test_learner_totals.py.
"""

from __future__ import annotations

from collections.abc import Mapping

UNSEEN = -1
"""In the place of a maximum, none of which is below 0, where there was nothing to take it over."""


def said(
    sums: Mapping[str, float], maxima: Mapping[str, float], over: Mapping[str, str]
) -> dict[str, float]:
    """The sums, those named in `over` divided by the sum that it names; and the maxima. A mean over nothing and a maximum of nothing are left out,
    since 0 would say that learner and engine agree, or that the policy has no entropy."""
    made = {name: most for name, most in maxima.items() if most != UNSEEN}
    for name, value in sums.items():
        count = sums[over[name]] if name in over else 1.0
        if count:
            made[name] = value / count
    return made
