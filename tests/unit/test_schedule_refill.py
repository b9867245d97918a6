"""Groups without signal: replaced while the step has further groups; and the rows of a run that goes on later."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agl_ray.schedule import Fate, Refill, RowPositions


def test_a_group_without_signal_is_replaced_until_the_steps_further_groups_are_used_up() -> None:
    refill = Refill(2)
    fates = [refill.fate(1, [1.0, 1.0], signal=False) for _ in range(4)]
    assert fates == [Fate.AGAIN, Fate.AGAIN, Fate.SHORT, Fate.SHORT]
    assert refill.fate(1, [0.0, 1.0], signal=True) is Fate.TAKE
    assert refill.fate(2, [0.0, 0.0], signal=False) is Fate.AGAIN  # each step has its own
    assert refill.settle(1) == {
        "groups_sampled": 5,
        "groups_refilled": 2,
        "groups_short": 2,
        "reward_sampled": 0.9,
    }
    assert refill.settle(1)["groups_sampled"] == 0
    assert refill.settle(2)["groups_refilled"] == 1


def test_a_limit_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="extra_per_step: expected 1 or more, got 0"):
        Refill(0)


def test_rows_of_a_settled_step_are_used_up_and_others_are_handed_out_again() -> None:
    rows = RowPositions()
    assert [rows.take(step) for step in (1, 1, 2, 1, 2)] == [0, 1, 2, 3, 4]
    rows.settle(1)
    assert (rows.next_row, rows.open_rows) == (5, (2, 4))
    later = RowPositions(rows.next_row, rows.open_rows)
    assert later.open_rows == (2, 4)
    assert [later.take(2) for _ in range(3)] == [2, 4, 5]
    later.settle(2)
    assert (later.next_row, later.open_rows) == (6, ())


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), max_size=20),
    st.lists(st.booleans(), min_size=20, max_size=20),
)
def test_whatever_is_interrupted_every_row_is_used_up_once(
    steps: list[tuple[int, int]], interrupted: list[bool]
) -> None:
    """Each step takes rows, some for the step after it; the run is interrupted before some of the steps are journalled."""
    rows, used = RowPositions(), []
    for step, (own, ahead) in enumerate(steps):
        mine = [rows.take(step) for _ in range(own)]
        for _ in range(ahead):
            rows.take(step + 1)
        if interrupted[step]:
            rows = RowPositions(rows.next_row, rows.open_rows)
            continue
        held = [row for row, of in rows._step_of.items() if of == step]
        assert set(mine) <= set(held)
        rows.settle(step)
        used += held
    assert len(used) == len(set(used))
    assert sorted([*used, *rows.open_rows]) == list(range(rows.next_row))
