"""Calls -> rows to train on: every response token counts in exactly one row, with the call that made it and how.

A call that continues another one (`parent_call`, `parent_tokens`, spans/schema.py) shares its tokens, so the calls of an attempt form a
tree over exact token ids: turns, sub-agents, branches, compaction, interleaved agents. Policies (`trajectory.rows`):

    merge-prefix  one row per leaf of that tree: a conversation whose turns extend each other exactly is one row; where a turn shares
                  only part of its parent, the tree branches and the shared tokens are trained in the first of the rows
    per-call      one row per call, its whole prompt as context
    tree          the rows of merge-prefix; what they share at their beginnings is run forward once (trajectory/tree.py)

Called by learner/prepare.py on rank 0. Python loops run over calls, numpy over tokens. Test it alone with
tests/unit/test_trajectory_rows.py. Legend: C calls, N tokens of all rows, R rows, K stretches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from agl_ray.config.trajectory import TrajectoryConfig
from agl_ray.trajectory.calls import Calls, Use, read_calls
from agl_ray.trajectory.ragged import Array, Rows


@dataclass(frozen=True, slots=True)
class AttemptRows:
    """Rows of all attempts, in the order of the attempts.

    rows.weights is 1 where the policy made the token and it is trained here. rows.columns, each [N]: `engine_logprobs` float32 (0 where
    not made by a call), `versions` int32 (weight version that made the token; -1 where none did), `temperature` float32 of its sampling
    (1 where it is not trained here), `call` int32 (the call that made it; -1 where none did).
    attempt: int64 [R], the row's index in the list of attempts. calls: what the rows were made of.
    """

    rows: Rows
    attempt: Array
    calls: Calls

    @property
    def num_branches(self) -> int:
        """Calls that share only a part of their parent."""
        children = np.flatnonzero(self.calls.parent >= 0)
        parents = self.calls.parent[children]
        return int((self.calls.shared[children] < self.calls.end[parents]).sum())

    def counts(self) -> dict[str, float]:
        """The step's metrics of calls and of their tokens: which are trained, which left out why, how many the merging saved."""
        calls = self.calls
        left_out = {use.name.lower(): use for use in Use if use != Use.TRAINED}  # context only
        return {
            "calls": float(len(calls)),
            "branches": float(self.num_branches),
            "rollouts_without_calls": float(len(calls.attempts) - len(np.unique(calls.attempt))),
            "tokens_made": float(calls.responses.sum()),
            "tokens_merged": float(calls.end.sum() - self.rows.lengths.sum()),
            "retokenized_tokens": float(calls.retokenized),
            **{f"calls_{name}": float((calls.use == use).sum()) for name, use in left_out.items()},
            **{
                f"tokens_dropped_{name}": float(calls.tokens_of(use))
                for name, use in left_out.items()
            },
        }


def build_rows(
    spans: pa.Table,
    attempts: Sequence[tuple[str, str]],
    config: TrajectoryConfig | None = None,
) -> AttemptRows:
    """The rows of these attempts from their spans (SPAN_SCHEMA; ordered by attempt, then sequence id), by `config.rows`.

    A call whose status is ERROR, that was sampled at temperature 0, that was forced into a form, or that answered for a role which is not
    trained is context only. RunError names the
    attempt and the call whose columns contradict each other.
    """
    calls = read_calls(spans, attempts)
    last, stretches = POLICIES[(config or TrajectoryConfig()).rows](calls)
    return AttemptRows(_gather(calls, stretches), calls.attempt[last], calls)


# --- policies: which stretch of which call goes into which row -----------------------------------

Stretch = tuple[int, int, int, int, int]
"""row, call, from, to, trained from: places in the row; from: where the call's own tokens begin. Tokens of the response at or after
`trained from` count in this row."""
Layout = tuple[Array, list[Stretch]]
"""int64 [R], the last call of each row; its stretches, in row order."""


def _merge_prefix(calls: Calls) -> Layout:
    """Each row holds a first part of each of its calls, so what earlier rows trained of a call is always its first part too."""
    leaves, tree = _leaves(calls), _Tree.of(calls)
    done = calls.prompt.tolist()
    stretches: list[Stretch] = []
    for row, leaf in enumerate(leaves.tolist()):
        path = tree.path(row, leaf, done)
        for _, call, _, to, _ in path:
            done[call] = max(done[call], to)
        stretches.extend(path)
    return leaves, stretches


def _per_call(calls: Calls) -> Layout:
    """What a call's ancestors made is context: it counts in their own rows."""
    whole = np.flatnonzero(calls.end > 0)
    tree, done = _Tree.of(calls), calls.end.tolist()
    stretches: list[Stretch] = []
    for row, call in enumerate(whole.tolist()):
        done[call] = int(calls.prompt[call])
        stretches.extend(tree.path(row, call, done))
        done[call] = int(calls.end[call])
    return whole, stretches


POLICIES: dict[str, Callable[[Calls], Layout]] = {
    "merge-prefix": _merge_prefix,
    "per-call": _per_call,
    "tree": _merge_prefix,
}


def _leaves(calls: Calls) -> Array:
    """Calls that no other call of the attempt contains whole."""
    children = np.flatnonzero(calls.parent >= 0)
    whole = calls.shared[children] == calls.end[calls.parent[children]]
    contained = np.zeros(len(calls), bool)
    contained[calls.parent[children[whole]]] = True
    return np.flatnonzero(~contained & (calls.end > 0))


class _Tree(NamedTuple):
    """The columns of Calls that a walk up the tree reads, as lists: Python is faster there."""

    parent: list[int]
    shared: list[int]
    end: list[int]
    trained: list[bool]

    @classmethod
    def of(cls, calls: Calls) -> _Tree:
        columns = (calls.parent, calls.shared, calls.end, calls.trained)
        return cls(*(column.tolist() for column in columns))

    def path(self, row: int, leaf: int, done: list[int]) -> list[Stretch]:
        """The stretches of the row that ends with `leaf`, first call first. done: up to where each call's tokens count elsewhere."""
        stretches = []
        call, to = leaf, self.end[leaf]
        while call >= 0:
            start = self.shared[call]
            if start < to:
                count_from = min(done[call], to) if self.trained[call] else to
                stretches.append((row, call, start, to, count_from))
                to = start
            call = self.parent[call]
        stretches.reverse()
        return stretches


# --- stretches to rows -----------------------------------------------------------------------------


def _gather(calls: Calls, stretches: list[Stretch]) -> Rows:
    """Copies whole stretches: a few operations per call, however long it is."""
    table = np.array(stretches, np.int64).reshape(-1, 5)
    lengths = table[:, 3] - table[:, 2]
    total = int(lengths.sum())
    # One allocation: where the system gives large pages to large ones, its first use costs a twentieth.
    slab = np.empty((6, total), np.int32)
    ids, versions, maker = slab[:3]
    weights, logprobs, temperature = slab[3:].view(np.float32)
    weights[:] = logprobs[:] = 0.0
    begins = np.cumsum(lengths) - lengths
    call = table[:, 1]
    places = np.stack(
        [
            begins,
            lengths,
            np.clip(calls.prompt[call] - table[:, 2], 0, lengths),  # where the response begins
            calls.prompt_start[call],
            calls.response_start[call],
            # what nothing predicts, the first token of a row, does not count
            np.maximum(table[:, 4] - table[:, 2], table[:, 2] == 0),
            call,
        ],
        axis=1,
    )
    for begin, length, prompt, from_prompt, from_response, count, one in places.tolist():
        made, end = begin + prompt, begin + length
        ids[begin:made] = calls.prompt_ids[from_prompt : from_prompt + prompt]
        held = slice(from_response, from_response + length - prompt)
        ids[made:end] = calls.response_ids[held]
        logprobs[made:end] = calls.logprobs[held]
        versions[begin:made] = maker[begin:made] = -1
        versions[made:end] = calls.versions[held]
        maker[made:end] = one
        counts = max(made, begin + count)
        weights[counts:end] = 1.0
        temperature[begin:counts] = 1.0
        temperature[counts:end] = calls.temperature[one]
    row_lengths = np.bincount(table[:, 0], weights=lengths).astype(np.int64)
    columns: dict[str, Array] = {
        "engine_logprobs": logprobs,
        "versions": versions,
        "temperature": temperature,
        "call": maker,
    }
    return Rows(ids, row_lengths, weights, columns)
