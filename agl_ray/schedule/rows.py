"""Which row comes next: a seeded, endless, resumable order over the training rows."""

from __future__ import annotations

import numpy as np


class RowOrder:
    """Positions into a data set of `num_rows` rows: each epoch a permutation by (seed, epoch), or file order.

    `row(i)` is a pure function of i, so a resumed run continues where the interrupted one stopped.
    """

    def __init__(self, num_rows: int, seed: int, *, shuffle: bool = True) -> None:
        if num_rows < 1:
            raise ValueError(f"num_rows: expected 1 or more, got {num_rows}")
        self.num_rows, self.seed, self.shuffle = num_rows, seed, shuffle
        self._epoch, self._order = -1, np.arange(num_rows)

    def row(self, position: int) -> int:
        """The row index at `position` (0, 1, 2 ... without end)."""
        epoch, offset = divmod(position, self.num_rows)
        if not self.shuffle:
            return offset
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((self.seed, epoch)).permutation(self.num_rows)
        return int(self._order[offset])
