"""Rows of tokens of different lengths, columnar: what the trajectory room makes and the learner packs.

Called by trajectory/rows.py, learner/packing.py and learner/sft.py. Pure numpy; test it alone with
tests/unit/test_trajectory_ragged.py. Legend: R rows, N tokens of all rows together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Array = npt.NDArray


def ragged_arange(starts: Array, lengths: Array) -> Array:
    """`concatenate([arange(s, s + l) for s, l in zip(starts, lengths)])` as int64, without the loop."""
    lengths = np.asarray(lengths, np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    shift = np.asarray(starts, np.int64) - (ends - lengths)
    return np.arange(total, dtype=np.int64) + np.repeat(shift, lengths)


@dataclass(frozen=True, slots=True)
class Rows:
    """R rows (conversations) of N tokens in all, one after the other.

    ids: int32 [N], the token ids. lengths: int64 [R], tokens per row, each >= 1. weights: float32 [N], how much the
    prediction of *this* token (from the tokens before it in its row) counts in the loss; 0 = context only. The
    first token of a row has nothing before it, so its weight is 0. columns: more values per token, each [N].
    ValueError names the array that does not fit.
    """

    ids: Array
    lengths: Array
    weights: Array
    columns: Mapping[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.lengths < 1).any():
            raise ValueError(
                "Rows.lengths: expected 1 or more tokens in each row, got an empty row"
            )
        total = int(self.lengths.sum())
        for name, array in {"ids": self.ids, "weights": self.weights, **self.columns}.items():
            if array.shape != (total,):
                raise ValueError(
                    f"Rows.{name}: expected shape ({total},), the sum of lengths, got {array.shape}"
                )
        if self.weights[self.starts].any():
            raise ValueError(
                "Rows.weights: expected 0 for the first token of each row, which nothing predicts"
            )

    @classmethod
    def from_lists(
        cls,
        ids: Sequence[Sequence[int] | Array],
        weights: Sequence[Sequence[float] | Array],
        **columns: Sequence[Sequence[float] | Array],
    ) -> Rows:
        """Rows from one sequence per row. The first weight of each row is set to 0."""
        lengths = np.array([len(row) for row in ids], np.int64)
        flat = _concatenate(weights, np.float32)
        if flat.shape == (int(lengths.sum()),) and len(lengths):
            flat[np.cumsum(lengths) - lengths] = 0.0
        more = {name: _concatenate(column, np.float32) for name, column in columns.items()}
        return cls(_concatenate(ids, np.int32), lengths, flat, more)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def starts(self) -> Array:
        """int64 [R]: where each row begins in the flat arrays."""
        return np.cumsum(self.lengths) - self.lengths

    @property
    def row_of_token(self) -> Array:
        """int64 [N]: the row that each token belongs to."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def take(self, rows: Array) -> Rows:
        """The rows with these indices, in this order."""
        index = ragged_arange(self.starts[rows], self.lengths[rows])
        more = {name: column[index] for name, column in self.columns.items()}
        return Rows(self.ids[index], self.lengths[rows], self.weights[index], more)

    def head(self, most: int) -> Rows:
        """The first `most` tokens of each row (all, where it has no more)."""
        lengths = np.minimum(self.lengths, most)
        index = ragged_arange(self.starts, lengths)
        more = {name: column[index] for name, column in self.columns.items()}
        return Rows(self.ids[index], lengths, self.weights[index], more)


def _concatenate(rows: Sequence[Sequence[float] | Array], dtype: type) -> Array:
    if not rows:
        return np.zeros(0, dtype)
    return np.concatenate([np.asarray(row, dtype) for row in rows])
