"""The section `trajectory` of the configuration: how the calls of a rollout become rows to train on.

Read by `agl_ray.trajectory.rows` and `agl_ray.trajectory.overlong` through the learner. Test it alone with
tests/unit/test_trajectory_config.py.
"""

from __future__ import annotations

from typing import Literal

from agl_ray.config.section import Section


class TrajectoryConfig(Section):
    rows: Literal["merge-prefix", "per-call", "tree"] = "merge-prefix"
    """merge-prefix: calls whose prompt extends prompt and response of another are one row, a branch begins a new one; per-call: a row for
    every call, with its whole prompt; tree: the rows of merge-prefix, packed so that a beginning which rows of a micro-batch share (branches of a rollout,
    rollouts of a group) is run forward once. The same tokens are trained with the same weights; per-call runs more tokens forward, tree fewer."""
    overlong: Literal["drop", "truncate"] = "drop"
    """A row longer than `learner.max_row_tokens`: drop leaves all of it out; truncate keeps its first tokens, cuts off its end, and trains
    what is left. Both after the advantages are taken, and counted."""
