"""Which row comes next: a seeded, endless order over the training rows, and the place in it that a run goes on from.

Called by actors/rollout_groups.py. Test it alone with tests/property/test_schedule_window.py and tests/unit/test_schedule_rows.py.
"""

from __future__ import annotations

from collections.abc import Sequence

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


class RowPositions:
    """Hands out positions of `RowOrder`, and knows which of them a run that goes on later must hand out again.

    A position is open from `take` until its step's batch is journalled (`settle`): a run that ends before hands it out again, first of
    all. Those of settled steps are used up, whatever became of their groups (trained, dropped, without signal). next_row, open_rows: the
    state (`.next_row`, `.open_rows`) that an earlier sitting left.
    """

    def __init__(self, next_row: int = 0, open_rows: Sequence[int] = ()) -> None:
        self.next_row = next_row
        self._again = sorted(open_rows, reverse=True)
        self._step_of: dict[int, int] = {}

    def take(self, step: int) -> int:
        """A position for a group of training step `step`."""
        if self._again:
            position = self._again.pop()
        else:
            position, self.next_row = self.next_row, self.next_row + 1
        self._step_of[position] = step
        return position

    def settle(self, step: int) -> None:
        """The batch of `step` is whole: what was taken for it is used up."""
        self._step_of = {p: of for p, of in self._step_of.items() if of != step}

    @property
    def open_rows(self) -> tuple[int, ...]:
        """Positions below `next_row` that are not used up, in order."""
        return tuple(sorted([*self._again, *self._step_of]))
