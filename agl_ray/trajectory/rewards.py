"""Reward spans of attempts: a rollout's own rewards by dimension, and those of its parts.

`reward_target` says what a reward is for (agl_ray/spans/otel.py writes it): null the rollout, a span id that call, `tag:T` the calls whose request had
`T` as a value of `agentlightning.tag.<i>` in its metadata, `role:R` the calls of a role, `turn:N` the N-th call of the attempt (from 1).
Called by trajectory/credit.py. Python loops run over rewards. Test it alone with tests/unit/test_trajectory_credit.py.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from agl_ray.spans.schema import KIND_REWARD
from agl_ray.trajectory.attributes import entries
from agl_ray.trajectory.calls import Calls
from agl_ray.types.errors import RunError

PRIMARY = "primary"
_FURTHER = r"^agentlightning\.reward\.[1-9][0-9]*\.(name|value)$"
"""Attributes of the dimensions beside number 0, which is in the columns."""


class PartReward(NamedTuple):
    """A reward of a part of a rollout. primary: it is the first of its span, the one in the columns. calls: indices of the part's calls, one
    or more."""

    dimension: str
    value: float
    primary: bool
    calls: list[int]


class Rewards(NamedTuple):
    """own: by attempt, the last reward of every dimension that is for the rollout. parts: the others. unplaced: rewards of parts that no
    call belongs to."""

    own: list[dict[str, float]]
    parts: list[PartReward]
    unplaced: int


def read_rewards(spans: pa.Table, calls: Calls) -> Rewards:
    """The rewards of the attempts of `calls`, in the order of the spans. RunError names an attempt that was not asked for, or whose
    reward is no finite number."""
    wanted = ["rollout_id", "attempt_id", "reward", "reward_dimension", "reward_target"]
    here = pc.equal(spans["kind"], KIND_REWARD)
    columns = spans.select(wanted).combine_chunks().filter(here).to_pydict()
    further = _further(spans, here)
    order = {attempt: index for index, attempt in enumerate(calls.attempts)}
    own: list[dict[str, float]] = [{} for _ in calls.attempts]
    parts: list[PartReward] = []
    unplaced = 0
    places = _Places(calls)
    for number, (rollout, attempt, value, dimension, target) in enumerate(
        zip(*columns.values(), strict=True)
    ):
        if (rollout, attempt) not in order:
            raise RunError(
                f"the spans read for a training step hold a reward of attempt {attempt} of rollout {rollout}, which was not asked for"
            )
        member = order[rollout, attempt]
        first = dimension or PRIMARY
        given = {**further.get(number, {}), **({} if value is None else {first: value})}
        if not all(map(math.isfinite, given.values())):
            raise RunError(
                f"attempt {attempt} of rollout {rollout}: expected rewards that are finite numbers, got {given}"
            )
        found = None if target is None else places.of(member, target)
        if found is None:
            own[member].update(given)
        elif found:
            parts.extend(
                PartReward(name, amount, name == first, found) for name, amount in given.items()
            )
        else:
            unplaced += len(given)
    return Rewards(own, parts, unplaced)


def _further(spans: pa.Table, here: pa.ChunkedArray) -> dict[int, dict[str, float]]:
    """By the number of the reward's span: its further dimensions."""
    halves: defaultdict[tuple[int, str], dict[str, str]] = defaultdict(dict)
    found = entries(spans, here, lambda keys: pc.match_substring_regex(keys, _FURTHER))
    for number, key, text in found:
        start, _, half = key.rpartition(".")
        halves[number, start][half] = text
    further: defaultdict[int, dict[str, float]] = defaultdict(dict)
    for (number, _), both in halves.items():
        if len(both) == 2:
            further[number][str(json.loads(both["name"]))] = float(both["value"])
    return further


class _Places:
    """The calls that a target names, by attempt; looked up by what kinds of targets there are."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._kinds: dict[str, dict[tuple[int, str], list[int]]] = {}

    def of(self, attempt: int, target: str) -> list[int]:
        kind, colon, name = target.partition(":")
        if not colon:
            kind, name = "call", target
        if kind not in self._kinds:
            self._kinds[kind] = self._index(kind)
        return self._kinds[kind].get((attempt, name), [])

    def _index(self, kind: str) -> dict[tuple[int, str], list[int]]:
        calls = self._calls
        of_kind: dict[str, Sequence[Iterable[str]]] = {
            "call": [(one,) for one in calls.span_ids],
            "role": [() if one is None else (one,) for one in calls.roles],
            "turn": [(str(one),) for one in calls.turn.tolist()],
            "tag": [set(tags) for tags in calls.tags],
        }
        names = of_kind.get(kind, [])
        index: defaultdict[tuple[int, str], list[int]] = defaultdict(list)
        for call, (attempt, mine) in enumerate(zip(calls.attempt.tolist(), names, strict=False)):
            for name in mine:
                index[attempt, name].append(call)
        return index
