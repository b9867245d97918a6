"""Rows that begin alike as a prefix tree over exact token ids: every shared beginning once (`trajectory.rows: tree`).

Rows are put in the order of their ids, so that each one shares its longest beginning with the row before it. That is the tree, depth
first: a row's own tokens come after the branch that it leaves, and of a run of neighbouring rows each shared token is held once.

    rows       ids            shared   own     places (of each row's tokens among the 6 that are held)
    0          5 6 7          0        5 6 7   0 1 2
    1          5 6 8 9        2        8 9     0 1 3 4
    2          5 6 8 3        3        3       0 1 3 5

Calls of one attempt share tokens that way, and so do the rollouts of a group, which have their prompt in common: whoever made a token, a
model computes the same for it wherever the tokens before it are the same. Called by learner/layouts.py. Pure numpy; test it alone with
tests/property/test_trajectory_tree.py. Legend: R rows, N tokens of all rows, T of them held.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from agl_ray.trajectory.ragged import Array, Rows, ragged_arange


@dataclass(frozen=True, slots=True)
class Tree:
    """order: int64 [R], the rows in the order of their ids. lengths: int64 [R], their tokens, and shared: int64 [R], how many of them are
    those of the row before, both in that order. Equal rows share all their tokens."""

    order: Array
    lengths: Array
    shared: Array

    @classmethod
    def of(cls, rows: Rows) -> Tree:
        """The tree of these rows. One comparison of whole rows at a time; no loop over tokens."""
        letters = rows.ids.astype(">u4").tobytes()  # the order of bytes is the order of ids
        ends = 4 * np.cumsum(rows.lengths)
        begins = ends - 4 * rows.lengths
        words = [letters[a:b] for a, b in zip(begins.tolist(), ends.tolist(), strict=True)]
        order = np.array(sorted(range(len(rows)), key=words.__getitem__), np.int64)
        starts, lengths = rows.starts[order], rows.lengths[order]
        shared = np.zeros(len(rows), np.int64)
        for row in range(1, len(rows)):
            most = int(min(lengths[row - 1], lengths[row]))
            before, here = int(starts[row - 1]), int(starts[row])
            differs = rows.ids[before : before + most] != rows.ids[here : here + most]
            first = int(differs.argmax()) if most else 0
            shared[row] = first if differs[first] else most
        return cls(order, lengths, shared)

    @property
    def num_tokens(self) -> int:
        """T: tokens of all rows, those that rows share once."""
        return int(self.lengths.sum() - self.shared.sum())

    def cut(self, most: int) -> list[slice]:
        """Runs of neighbouring rows, each as long as it holds at most `most` tokens; a row that alone holds more is a run by itself.

        Where a run begins inside a branch it holds the branch's beginning again: one token per `shared` of its first row.
        """
        held = np.cumsum(self.lengths - self.shared)
        runs: list[slice] = []
        begin = 0
        while begin < len(self.lengths):
            before = held[begin] - self.lengths[begin]  # the first row holds all of its tokens
            end = max(begin + 1, int(np.searchsorted(held, before + most, side="right")))
            runs.append(slice(begin, end))
            begin = end
        return runs

    def divide(self, parts: int) -> list[slice]:
        """At most `parts` runs whose largest holds as few tokens as possible."""
        low, high = int(self.lengths.max(initial=1)), max(1, self.num_tokens)
        while low < high:
            middle = (low + high) // 2
            if len(self.cut(middle)) <= parts:
                high = middle
            else:
                low = middle + 1
        return self.cut(low)


def token_places(lengths: Array, shared: Array) -> Array:
    """int64 [N]: where each token of each row is among those that a run of rows holds. shared: as in Tree, 0 for the first row."""
    own = lengths - shared
    found = ragged_arange(np.cumsum(own) - own - shared, lengths)
    ends = np.cumsum(lengths)
    begins = ends - lengths
    for row in np.flatnonzero(shared).tolist():
        count, here, before = int(shared[row]), int(begins[row]), int(begins[row - 1])
        found[here : here + count] = found[before : before + count]
    return found
