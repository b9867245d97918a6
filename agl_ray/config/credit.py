"""The section `credit` of the configuration: what gets an advantage, from which rewards, against which others.

The defaults give the outcome of a rollout, against the others of its row, to every token of every turn (Flow-GRPO's broadcast, arXiv
2510.05592). Read by `agl_ray.trajectory.credit`. Test it alone with tests/unit/test_trajectory_credit.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from agl_ray.config.roles import RoleName
from agl_ray.config.section import Section

if TYPE_CHECKING:
    from agl_ray.config.roles import RoleConfig

GROUPS = ("row", "row+role", "row+faction")


class CreditConfig(Section):
    unit: Literal["rollout", "call", "role"] = "rollout"
    """What has one reward and one advantage: the rollout, each model call, or each role in a rollout. A reward given to a part (a call,
    turn, tag or role) counts once in every unit that has one of the part's calls."""
    group: str = "row"
    """Which units are compared: `row` (all of the rollouts of a row of the data), `row+role` (those of the same role; unit call or role),
    `row+faction` (those whose roles are on the same side, `factions`; unit call or role), or `file.py:function`, called with each `agl_ray.trajectory.credit.Unit` and returning a text; units of equal texts are a group."""
    factions: dict[str, Annotated[list[RoleName], Field(min_length=1)]] = {}
    """group row+faction: side -> its roles, `{wolves: [wolf, wolf_king], village: [seer, villager]}`. Where one side's gain is the other's loss, an
    advantage over all units of a row says which side a call was on; over one side it says how well that played. Every trained role is on one side."""
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
        if self.unit == "rollout" and self.group in ("row+role", "row+faction"):
            raise ValueError(
                f"credit.group {self.group} needs credit.unit call or role: a rollout may have many roles"
            )
        _check_factions(self)
        if self.unit == "rollout" and self.outcome == "last":
            raise ValueError(
                "credit.outcome last acts with credit.unit call or role only; leave it out"
            )
        if self.weights and not any(self.weights.values()):
            raise ValueError("credit.weights: expected a weight other than 0, got none")
        return self

    @property
    def faction_of(self) -> dict[str, str]:
        """Role -> its faction."""
        return {role: name for name, roles in self.factions.items() for role in roles}


def _check_factions(config: CreditConfig) -> None:
    """ValueError where factions would do nothing or a role is on two sides."""
    if (config.group == "row+faction") != bool(config.factions):
        raise ValueError(
            "credit.factions and credit.group row+faction act together only; got credit.group "
            f"{config.group!r} and {len(config.factions)} factions; give both or neither"
        )
    roles = Counter(role for roles in config.factions.values() for role in roles)
    twice = next((role for role, times in roles.items() if times > 1), None)
    if twice is not None:
        raise ValueError(
            f"credit.factions: expected every role once, got {twice!r} {roles[twice]} times; a role is on one side"
        )


def check_sides(credit: CreditConfig, roles: Mapping[str, RoleConfig]) -> None:
    """ValueError where the trained roles of `roles` and those of `credit.factions` are not the same. Roles that are not trained may be on a
    side too: whether they are trained may change from run to run, the sides do not."""
    if not credit.factions:
        return
    unknown = sorted(credit.faction_of.keys() - roles.keys())
    if unknown:
        raise ValueError(
            f"credit.factions: expected roles of the section roles ({', '.join(sorted(roles)) or 'it has none'}), got {unknown[0]!r}; name it there too"
        )
    trained = sorted(name for name, role in roles.items() if role.kind == "train")
    without = [name for name in trained if name not in credit.faction_of]
    if without:
        raise ValueError(
            f"credit.factions: expected every trained role on a side, got none for {without[0]!r}; put it into a faction"
        )
    if not trained:
        raise ValueError(
            "credit.factions: expected a role of kind train, got none in roles: only trained calls are compared; leave factions out"
        )
