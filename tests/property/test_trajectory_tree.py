"""Rows as a prefix tree: every token once, ancestors exact, rows whole again; however it is cut."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from agl_ray.learner.attention import blocks_of
from agl_ray.learner.layouts import share_tree
from agl_ray.learner.packing import Packed, pack_tree
from agl_ray.trajectory.ragged import Rows
from agl_ray.trajectory.tree import Tree

ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=14)
"""Three ids only: rows share, repeat and begin each other."""


def made(ids: list[list[int]]) -> Rows:
    """Rows whose weighted tokens are told apart by column `name`."""
    rng = np.random.default_rng(len(ids))
    names = np.split(np.arange(sum(map(len, ids))), np.cumsum([len(row) for row in ids])[:-1])
    return Rows.from_lists(ids, [rng.integers(0, 2, len(row)) for row in ids], name=names)


def prefixes(ids: list[list[int]]) -> set[tuple[int, ...]]:
    """The nodes of the tree, each as the way to it."""
    return {tuple(row[: end + 1]) for row in ids for end in range(len(row))}


def way_to(micro: Packed) -> list[tuple[int, ...]]:
    """Of every token in input_ids: what the attention lets it see, from the blocks alone."""
    seen: dict[int, tuple[int, ...]] = {}
    blocks = blocks_of(micro.lengths, micro.shared, "cpu")  # type: ignore[arg-type]
    for block in blocks.blocks:
        rows, asks = block.queries.shape
        mask = block.mask(None)
        for row in range(rows):
            for ask in range(asks):
                if row * asks + ask not in block.real.tolist():
                    continue
                sees = range(ask + 1) if mask is None else mask[row, 0, ask].nonzero()[:, 0]
                place = int(block.queries[row, ask])
                assert place not in seen
                seen[place] = tuple(int(block.keys[row, key]) for key in sees)
    return [seen[place] for place in range(micro.num_tokens)]


@settings(deadline=None, max_examples=150)
@given(ROWS, st.integers(1, 30))
def test_every_token_is_there_once_and_sees_its_ancestors(ids: list[list[int]], most: int) -> None:
    rows = made(ids)
    packs = pack_tree(rows, most)
    assert sorted(np.concatenate([micro.rows for micro in packs]).tolist()) == list(range(len(ids)))
    for micro in packs:
        inside = [ids[row] for row in micro.rows]
        assert micro.num_tokens == len(prefixes(inside))
        assert micro.num_tokens <= most or len(micro.rows) == 1
        seen = way_to(micro)
        assert {tuple(micro.input_ids[0, list(way)].tolist()) for way in seen} == prefixes(inside)
        assert all(way[-1] == place for place, way in enumerate(seen))
        assert micro.position_ids[0].tolist() == [len(way) - 1 for way in seen]
        ends = np.cumsum(micro.lengths)[:-1]
        for row, way in zip(inside, np.split(micro.places, ends), strict=True):
            assert micro.input_ids[0, way].tolist() == row
            assert tuple(way.tolist()) == seen[way[-1]]


@settings(deadline=None, max_examples=150)
@given(ROWS, st.integers(1, 30))
def test_every_trained_token_is_predicted_once_from_the_one_before_it(
    ids: list[list[int]], most: int
) -> None:
    rows = made(ids)
    found: dict[float, tuple[int, ...]] = {}
    for micro in pack_tree(rows, most):
        seen = way_to(micro)
        where, targets, before = micro.predicted
        for name, token, place in zip(micro.columns["name"][where], targets, before, strict=True):
            assert name not in found
            found[name] = (*micro.input_ids[0, list(seen[place])].tolist(), int(token))
    expected = {}
    for name in np.flatnonzero(rows.weights).tolist():
        row = int(rows.row_of_token[name])
        expected[name] = tuple(ids[row][: name - int(rows.starts[row]) + 1])
    assert found == expected


@settings(deadline=None, max_examples=150)
@given(ROWS, st.integers(1, 5))
def test_ranks_share_the_rows_and_no_cut_is_better(ids: list[list[int]], ranks: int) -> None:
    rows = made(ids)
    part = np.arange(len(ids))[:: 2 if len(ids) > 4 else 1]
    shares = share_tree(rows, part, ranks)
    assert len(shares) == ranks
    assert sorted(np.concatenate(shares).tolist()) == part.tolist()
    loads = [len(prefixes([ids[row] for row in share])) for share in shares]
    tree = Tree.of(rows.take(part))
    assert sum(loads) >= tree.num_tokens == len(prefixes([ids[row] for row in part]))
    if max(loads) > 1:  # one token less for each does not go
        assert len(tree.cut(max(loads) - 1)) > ranks or max(tree.lengths) == max(loads)
