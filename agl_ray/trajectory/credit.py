"""Credit: units (rollouts, calls, roles) with one reward each, and the groups in which they are compared.

    R(u) = outcome of its rollout, where `credit.outcome` puts it, + every reward of a part that has a call in u

each the weighted sum over the dimensions of `credit.weights` (without weights, of each span the primary one). An algorithm makes an advantage of R and of the groups; every token has
the advantage of the unit that its call belongs to, however calls were cut into rows. Units are made of all attempts of the batch,
before anything is dropped. Called by learner/prepare.py. Test it alone with tests/unit/test_trajectory_credit.py.
Legend: U units, C calls, M attempts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from agl_ray.config.credit import GROUPS, CreditConfig
from agl_ray.config.imports import load_object
from agl_ray.trajectory.batch import TrainBatch
from agl_ray.trajectory.calls import Calls, Use
from agl_ray.trajectory.ragged import Array
from agl_ray.trajectory.rewards import PRIMARY, PartReward, Rewards, read_rewards
from agl_ray.types.errors import InputError, RunError

NOT_THE_POLICYS = (Use.FAILED, Use.FROZEN)
"""Calls that are no unit of their own: nothing that the policy did."""


class Unit(NamedTuple):
    """What a user's `credit.group` is told of a unit. role: None for a whole rollout and for calls without one. turn: number of the call in
    its attempt, from 1; 0 where the unit is no call. tags: of the call."""

    group_id: str
    rollout_id: str
    attempt_id: str
    role: str | None
    turn: int
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Units:
    """reward: float64 [U]. group: int64 [U], 0 .. number of groups - 1. member: int64 [U], the attempt's index in the batch. row: int64 [U],
    index of its GroupPlan. role: [U]. turn: int64 [U], 0 where the unit is no call. tokens: int64 [U], of the policy, before anything is
    dropped. state: int64 [U], equal where the calls saw the same new prompt tokens; -1 where the unit is no call.
    of_call: int64 [C], the unit of each call; -1 for none. counts: of the step's metrics.
    """

    reward: Array
    group: Array
    member: Array
    row: Array
    role: list[str | None]
    turn: Array
    tokens: Array
    state: Array
    of_call: Array
    counts: Mapping[str, float]


class Credit:
    """`units` for one configuration; a function that it names is looked up in the current directory, then in `base` (InputError)."""

    def __init__(self, config: CreditConfig | None = None, base: Path | None = None) -> None:
        self.config = config or CreditConfig()
        self._key: Callable[[Unit], object] | None = None
        if self.config.group not in GROUPS:
            self._key = load_object(self.config.group, base or Path.cwd())

    def units(self, calls: Calls, spans: pa.Table, batch: TrainBatch) -> Units:
        """The units of the attempts of `batch`, which `calls` were read from, with their rewards from `spans`.

        RunError: no reward of any dimension of `credit.weights`. InputError: a group function that gives no text.
        """
        rewards = read_rewards(spans, calls)
        outcome, there = self._outcomes(rewards, batch)
        of_call, member, role, call = self._divide(calls, np.flatnonzero(there))
        reward = np.zeros(len(member))
        self._give_outcome(reward, outcome, member, of_call, calls)
        unit_of = of_call.tolist()
        for part in rewards.parts:
            worth = self._weight(part) * part.value
            for unit in {unit_of[one] for one in part.calls} - {-1}:
                reward[unit] += worth
        row = np.repeat(np.arange(len(batch.groups)), [len(g.members) for g in batch.groups])
        units_of = _Sides(calls, batch, member, row[member], role, call)
        group = self._groups(units_of)
        policys = np.flatnonzero((of_call >= 0) & calls.trained)
        tokens = np.zeros(len(member), np.int64)
        np.add.at(tokens, of_call[policys], calls.responses[policys])
        counts = {
            "units": float(len(member)),
            "unit_groups": float(len(np.unique(group))),
            "rewards_of_parts": float(len(rewards.parts)),
            "rewards_unplaced": float(rewards.unplaced),
            "rollouts_without_reward": float((~there).sum()),
            **_means("reward_of", ((name, r) for own in rewards.own for name, r in own.items())),
            **_means("reward_role", _by_label(self._roles(calls), unit_of, reward)),
            **_means("reward_tag", _by_label(calls.tags, unit_of, reward)),
        }
        return Units(
            reward, group, member, row[member], role, units_of.turns(), tokens, units_of.states(), of_call, counts
        )  # fmt: skip

    def _roles(self, calls: Calls) -> Iterable[tuple[str, ...]]:
        """Of each call, for the metrics: calls without a role are worth a line only where units have roles."""
        unnamed = () if self.config.unit == "rollout" else ("none",)
        return ((role,) if role else unnamed for role in calls.roles)

    def _weight(self, part: PartReward) -> float:
        weights = self.config.weights
        return weights.get(part.dimension, 0.0) if weights else float(part.primary)

    def _outcomes(self, rewards: Rewards, batch: TrainBatch) -> tuple[Array, Array]:
        """Each attempt's own reward, float64 [M]; bool [M], whether it has what others have of the dimensions that count."""
        plain = [member.reward for member in batch.members]
        weights = self.config.weights
        if not weights or self.config.outcome == "none":
            return np.array(plain, np.float64), np.ones(len(plain), bool)
        own = [{**found, PRIMARY: reward} for found, reward in zip(rewards.own, plain, strict=True)]
        given = {name for found in own for name in found}
        if own and not weights.keys() & (given | {part.dimension for part in rewards.parts}):
            raise RunError(
                f"credit.weights: expected rewards of at least one of the dimensions {sorted(weights)}, got none in the whole batch; "
                f"its rollouts have rewards of {sorted(given)}"
            )
        needed = weights.keys() & given
        sums = [sum(w * found.get(name, 0.0) for name, w in weights.items()) for found in own]
        return np.array(sums, np.float64), np.array([needed <= found.keys() for found in own], bool)

    def _divide(self, calls: Calls, members: Array) -> tuple[Array, Array, list[str | None], Array]:
        """of_call [C]; member, role, call [U] (-1 where the unit is no call). Units only of these members."""
        number = np.full(len(calls.attempts), -1, np.int64)
        number[members] = np.arange(len(members))
        if self.config.unit == "rollout":
            nothing = np.full(len(members), -1, np.int64)
            return number[calls.attempt], members, [None] * len(members), nothing
        mine = np.flatnonzero((number[calls.attempt] >= 0) & ~np.isin(calls.use, NOT_THE_POLICYS))
        of_call = np.full(len(calls), -1, np.int64)
        if self.config.unit == "call":
            of_call[mine] = np.arange(len(mine))
            return of_call, calls.attempt[mine], [calls.roles[call] for call in mine], mine
        keys = [(int(calls.attempt[call]), calls.roles[call]) for call in mine.tolist()]
        of_call[mine], places = _numbers(keys)
        first = mine[places]
        nothing = np.full(len(first), -1, np.int64)
        return of_call, calls.attempt[first], [calls.roles[call] for call in first], nothing

    def _give_outcome(
        self, reward: Array, outcome: Array, member: Array, of_call: Array, calls: Calls
    ) -> None:
        if self.config.outcome == "broadcast":
            reward += outcome[member]
        elif self.config.outcome == "last":
            there = np.flatnonzero(of_call >= 0)
            last = np.full(len(calls.attempts), -1, np.int64)
            last[calls.attempt[there]] = there  # the last of equal places stays
            reward[of_call[last[last >= 0]]] += outcome[last >= 0]

    def _groups(self, units: _Sides) -> Array:
        if self._key is not None:
            return _numbers([self._asked(unit) for unit in units.described()])[0]
        among = _AMONG[self.config.group](self.config, units)
        return _numbers(list(zip(units.row.tolist(), among, strict=True)))[0]

    def _asked(self, unit: Unit) -> str:
        key = self._key(unit) if self._key else ""
        if not isinstance(key, str):
            raise InputError(
                f"credit.group {self.config.group}: expected a text for each unit, got {key!r} for {unit}"
            )
        return key


def _factions(config: CreditConfig, units: _Sides) -> list[str]:
    """The faction of each unit's role. RunError names a role that has none."""
    sides = config.faction_of
    for role, member in zip(units.role, units.member.tolist(), strict=True):
        if role not in sides:
            rollout = units.calls.attempts[member][0]
            raise RunError(
                f"credit.group row+faction: expected the calls of the policy to be of the roles {', '.join(sorted(sides))}, got one of "
                f"{f'role {role!r}' if role else 'no role'} in rollout {rollout}; put the role into credit.factions, or make the call under one of them"
            )
    return [sides[role] for role in units.role if role is not None]


_AMONG: Mapping[str, Callable[[CreditConfig, _Sides], Sequence[str | None]]] = {
    "row": lambda config, units: [None] * len(units.role),
    "row+role": lambda config, units: units.role,
    "row+faction": _factions,
}
"""By `credit.group`: what units of a row must have alike to be compared."""


def _numbers(keys: Sequence[Hashable]) -> tuple[Array, Array]:
    """int64, equal where keys are equal, 0 .. in order of their first appearance; and where each appears first."""
    numbers: dict[Hashable, int] = {}
    found = np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)
    return found, np.unique(found, return_index=True)[1].astype(np.int64)


def _by_label(
    labels: Iterable[Iterable[str]], unit_of: Sequence[int], reward: Array
) -> Iterator[tuple[str, float]]:
    """labels: of each call. Every label with the reward of each unit that has a call of it."""
    pairs = {
        (label, unit): None
        for mine, unit in zip(labels, unit_of, strict=True)
        if unit >= 0
        for label in mine
    }
    return ((label, float(reward[unit])) for label, unit in pairs)


def _means(prefix: str, values: Iterable[tuple[str, float]]) -> dict[str, float]:
    """`PREFIX.NAME`: the mean of the values of this name."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for name, value in values:
        found[name].append(value)
    return {f"{prefix}.{name}": float(np.mean(each)) for name, each in found.items()}


class _Sides(NamedTuple):
    """Where the units are: of which attempt, row and role, and which call (-1: none), each [U]."""

    calls: Calls
    batch: TrainBatch
    member: Array
    row: Array
    role: list[str | None]
    call: Array

    def described(self) -> Iterator[Unit]:
        columns = (self.member.tolist(), self.row.tolist(), self.role, self.call.tolist())
        for member, row, role, call in zip(*columns, strict=True):
            turn = int(self.calls.turn[call]) if call >= 0 else 0
            tags = self.calls.tags[call] if call >= 0 else ()
            group_id = self.batch.groups[row].group_id
            rollout_id, attempt_id = self.calls.attempts[member]
            yield Unit(group_id, rollout_id, attempt_id, role, turn, tags)

    def turns(self) -> Array:
        turn = np.zeros(len(self.call), np.int64)
        there = self.call >= 0
        turn[there] = self.calls.turn[self.call[there]]
        return turn

    def states(self) -> Array:
        calls, there = self.calls, self.call >= 0
        starts = calls.prompt_start[self.call[there]]
        ends = starts + (calls.prompt - calls.shared)[self.call[there]]
        ids = calls.prompt_ids
        seen = [ids[a:b].tobytes() for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
        states = np.full(len(self.call), -1, np.int64)
        states[there] = _numbers(seen)[0]
        return states
