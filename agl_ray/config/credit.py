"""The section `credit` of the configuration: what gets an advantage, from which rewards, against which others.

The defaults give the outcome of a rollout, against the others of its row, to every token of every turn (Flow-GRPO's broadcast, arXiv
2510.05592). Read by `agl_ray.trajectory.credit`. Test it alone with tests/unit/test_trajectory_credit.py.
"""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from agl_ray.config.section import Section

GROUPS = ("row", "row+role")


class CreditConfig(Section):
    unit: Literal["rollout", "call", "role"] = "rollout"
    """What has one reward and one advantage: the rollout, each model call, or each role in a rollout. A reward given to a part (a call,
    turn, tag or role) counts once in every unit that has one of the part's calls."""
    group: str = "row"
    """Which units are compared: `row` (all of the rollouts of a row of the data), `row+role` (those of the same role; unit call or role), or
    `file.py:function`, called with each `agl_ray.trajectory.credit.Unit` and returning a text; units of equal texts are a group."""
    outcome: Literal["broadcast", "last", "none"] = "broadcast"
    """Where the rollout's own reward counts: in all of its units, in the unit of its last call (so that returns can be discounted), or
    nowhere (rewards of parts only)."""
    weights: dict[str, float] = {}
    """Dimension of reward -> its weight in the sum; others do not count. `primary` is the rollout's reward. A rollout that lacks a dimension which
    others of its batch were given is left out, and counted. Empty: the rollout's reward as it is, and the primary one of each reward of a part."""

    @model_validator(mode="after")
    def _fits_together(self) -> CreditConfig:
        if self.group not in GROUPS and ":" not in self.group:
            raise ValueError(
                f"credit.group: expected {', '.join(GROUPS)} or file.py:function, got {self.group!r}"
            )
        if self.unit == "rollout" and self.group == "row+role":
            raise ValueError(
                "credit.group row+role needs credit.unit call or role: a rollout may have many roles"
            )
        if self.unit == "rollout" and self.outcome == "last":
            raise ValueError(
                "credit.outcome last acts with credit.unit call or role only; leave it out"
            )
        if self.weights and not any(self.weights.values()):
            raise ValueError("credit.weights: expected a weight other than 0, got none")
        return self
