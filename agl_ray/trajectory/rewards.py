"""Reward spans of attempts: a rollout's own rewards by dimension, and those of its parts.

`reward_target` says what a reward is for (agl_ray/spans/otel.py writes it): null the rollout, a span id that call, `tag:T` the calls whose request had
`T` as a value of `agentlightning.tag.<i>` in its metadata, `role:R` the calls of a role, `turn:N` the N-th call of the attempt (from 1).
Called by trajectory/credit.py. Python loops run over rewards. Test it alone with tests/unit/test_trajectory_credit.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from agl_ray.spans.schema import KIND_REWARD
from agl_ray.trajectory.calls import Calls
from agl_ray.types.errors import RunError

PRIMARY = "primary"
_FURTHER = "agentlightning.reward."  # <i>.name, <i>.value: dimensions beside the one in the columns


class PartReward(NamedTuple):
    """A reward of a part of a rollout. calls: indices of the part's calls, one or more."""

    dimension: str
    value: float
    calls: list[int]


class Rewards(NamedTuple):
    """own: by attempt, the last reward of every dimension that is for the rollout. parts: the others. unplaced: rewards of parts that no
    call belongs to."""

    own: list[dict[str, float]]
    parts: list[PartReward]
    unplaced: int


def read_rewards(spans: pa.Table, calls: Calls) -> Rewards:
    """The rewards of the attempts of `calls`, in the order of the spans. RunError names an attempt that was not asked for."""
    wanted = ["rollout_id", "attempt_id", "reward", "reward_dimension", "reward_target"]
    here = pc.equal(spans["kind"], KIND_REWARD)
    table = spans.select([*wanted, "attributes"]).filter(here)
    order = {attempt: index for index, attempt in enumerate(calls.attempts)}
    own: list[dict[str, float]] = [{} for _ in calls.attempts]
    parts: list[PartReward] = []
    unplaced = 0
    places = _Places(calls)
    for row in table.to_pylist():
        key = (row["rollout_id"], row["attempt_id"])
        if key not in order:
            raise RunError(
                f"the spans read for a training step hold a reward of attempt {key[1]} of rollout {key[0]}, which was not asked for"
            )
        found = places.of(order[key], row["reward_target"]) if row["reward_target"] else None
        for dimension, value in _dimensions(row):
            if found is None:
                own[order[key]][dimension] = value
            elif found:
                parts.append(PartReward(dimension, value, found))
            else:
                unplaced += 1
    return Rewards(own, parts, unplaced)


def _dimensions(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The dimension in the columns, and those that are only in the attributes, whose values are JSON."""
    first = row["reward_dimension"] or PRIMARY
    if row["reward"] is not None:
        yield first, float(row["reward"])
    attributes = dict(row["attributes"] or ())
    for key, name in attributes.items():
        if key.startswith(_FURTHER) and key.endswith(".name") and name.strip('"') != first:
            value = attributes.get(f"{key.removesuffix('.name')}.value")
            if value is not None:
                yield name.strip('"'), float(value)


class _Places:
    """The calls that a target names, by attempt."""

    def __init__(self, calls: Calls) -> None:
        self._named: defaultdict[tuple[int, str], list[int]] = defaultdict(list)
        columns: Sequence[Sequence[Any]] = (
            calls.attempt.tolist(), calls.span_ids, calls.roles, calls.tags, calls.turn.tolist()
        )  # fmt: skip
        for call, (attempt, span_id, role, tags, turn) in enumerate(zip(*columns, strict=True)):
            names = [span_id, f"turn:{turn}", *(f"tag:{tag}" for tag in tags)]
            names += [] if role is None else [f"role:{role}"]
            for name in names:
                self._named[attempt, name].append(call)

    def of(self, attempt: int, target: str) -> list[int]:
        return self._named.get((attempt, target), [])
