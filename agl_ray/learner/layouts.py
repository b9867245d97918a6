"""Which rows of an update a rank gets, and how it packs them: row by row, or as a tree (`trajectory.rows`).

Called by learner/prepare.py. Pure numpy; test it alone with tests/unit/test_learner_tree.py. Legend: R rows of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from agl_ray.learner.packing import Packed, pack, pack_tree
from agl_ray.trajectory.ragged import Array, Rows
from agl_ray.trajectory.tree import Tree


class Layout(NamedTuple):
    """share(rows, part, world_size): the indices in `rows` of each rank's rows, of those in `part`, so that ranks have about as many tokens
    to run forward. pack(rows, tokens): micro-batches of at most `tokens` tokens."""

    share: Callable[[Rows, Array, int], list[Array]]
    pack: Callable[[Rows, int], list[Packed]]


def share_rows(rows: Rows, part: Array, world_size: int) -> list[Array]:
    """Longest row first, each to the rank that has the fewest tokens."""
    shares: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for row in part[np.argsort(-rows.lengths[part], kind="stable")].tolist():
        rank = loads.index(min(loads))
        shares[rank].append(row)
        loads[rank] += int(rows.lengths[row])
    return [np.array(share, np.int64) for share in shares]


def share_tree(rows: Rows, part: Array, world_size: int) -> list[Array]:
    """Runs of neighbours in the tree, so that the rank with the most tokens has as few as it can."""
    tree = Tree.of(rows.take(part))
    shares = [part[tree.order[run]] for run in tree.divide(world_size)]
    return shares + [np.zeros(0, np.int64)] * (world_size - len(shares))


LINEAR = Layout(share_rows, pack)
TREE = Layout(share_tree, pack_tree)
LAYOUTS = {"merge-prefix": LINEAR, "per-call": LINEAR, "tree": TREE}
"""By `trajectory.rows`."""
