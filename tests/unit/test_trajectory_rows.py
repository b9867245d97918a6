"""Call trees to rows: hand-made cases. tests/property/test_trajectory_trees.py has the random ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from learner_data import call, table

from agl_ray.config.trajectory import TrajectoryConfig
from agl_ray.trajectory.rows import AttemptRows, build_rows
from agl_ray.types import RunError

ATTEMPT = ("ro-1", "at-1")
OTHER = ("ro-2", "at-2")


PER_CALL = TrajectoryConfig(rows="per-call")


def rows_of(*spans: dict[str, Any], config: TrajectoryConfig | None = None) -> AttemptRows:
    return build_rows(table(spans), [ATTEMPT, OTHER], config)


def shown(built: AttemptRows) -> list[list[str]]:
    """Each row as text: a token id, with `*` where it is trained."""
    ends = np.cumsum(built.rows.lengths)[:-1]
    split = zip(np.split(built.rows.ids, ends), np.split(built.rows.weights, ends), strict=True)
    return [
        [f"{token}{'*' if weight else ''}" for token, weight in zip(ids, weights, strict=True)]
        for ids, weights in split
    ]


def test_a_conversation_is_one_row() -> None:
    built = rows_of(
        call("a", [1, 2], [3, 4]),
        call("b", [5], [6, 7], parent="a", shared=4, versions=[(0, 1), (1, 2)]),
    )
    assert shown(built) == [["1", "2", "3*", "4*", "5", "6*", "7*"]]
    columns = built.rows.columns
    assert columns["versions"].tolist() == [-1, -1, 0, 0, -1, 1, 2]
    np.testing.assert_allclose(columns["engine_logprobs"], [0, 0, -0.125, -0.25, 0, -0.125, -0.25])
    assert built.num_branches == 0


def test_a_branch_makes_a_second_row_and_shared_tokens_are_trained_once() -> None:
    built = rows_of(
        call("a", [1, 2], [3, 4]),
        call("b", [5], [6, 7], parent="a", shared=4),
        call("c", [8], [9], parent="a", shared=4),  # another turn after the same `a`
        call("d", [], [10], parent="b", shared=6),  # in the middle of b's response
    )
    assert shown(built) == [
        ["1", "2", "3*", "4*", "5", "6*", "7*"],
        ["1", "2", "3", "4", "8", "9*"],
        ["1", "2", "3", "4", "5", "6", "10*"],
    ]
    assert built.num_branches == 1
    assert built.attempt.tolist() == [0, 0, 0]


def test_a_branch_that_leaves_before_its_parents_own_tokens() -> None:
    built = rows_of(
        call("a", [1, 2], [3, 4]),
        call("b", [5], [6], parent="a", shared=4),
        call("c", [7], [8], parent="b", shared=3),  # shares only part of what b shares with a
    )
    assert shown(built) == [
        ["1", "2", "3*", "4*", "5", "6*"],
        ["1", "2", "3", "7", "8*"],
    ]


def test_a_longer_part_is_trained_in_a_later_row() -> None:
    built = rows_of(
        call("a", [1], [2, 3, 4]),
        call("b", [5], [6], parent="a", shared=2),
        call("c", [7], [8], parent="a", shared=3),
        call("d", [], [9], parent="a", shared=4),
    )
    assert shown(built) == [
        ["1", "2*", "5", "6*"],
        ["1", "2", "3*", "7", "8*"],
        ["1", "2", "3", "4*", "9*"],
    ]


def test_the_same_prompt_twice_is_two_rows() -> None:
    built = rows_of(call("a", [1, 2], [3]), call("b", [1, 2], [3]))
    assert shown(built) == [["1", "2", "3*"], ["1", "2", "3*"]]


def test_attempts_stay_apart_and_other_spans_are_passed_over() -> None:
    tool = {**call("t", [], []), "kind": "span"}
    stray = {**call("s", [7], [8, 9]), "kind": "span"}  # no call, whatever it carries
    built = rows_of(call("a", [1], [2]), tool, stray, call("a", [3], [4], attempt=OTHER))
    assert shown(built) == [["1", "2*"], ["3", "4*"]]
    assert built.attempt.tolist() == [0, 1]
    assert built.counts()["calls"] == 2


def test_a_failed_or_greedy_call_is_context_only() -> None:
    cold = {"request": {"sampling": {"temperature": 0.0}}}
    warm = {"request": {"messages": [], "sampling": {"temperature": 0.5}}}
    built = rows_of(
        call("a", [1], [2], status="ERROR"),
        call("b", [3], [4], parent="a", shared=2, attributes=warm),
        call("c", [5], [6], attributes=cold),
    )
    assert shown(built) == [["1", "2", "3", "4*"], ["5", "6"]]
    counts = built.counts()
    assert (counts["calls_failed"], counts["calls_greedy"]) == (1, 1)
    assert built.rows.columns["temperature"].tolist() == [1, 1, 1, 0.5, 1, 1]


def test_a_constrained_call_is_context_only_and_counted() -> None:
    built = rows_of(
        call("a", [1], [2, 3], attributes={"agl.constrained": "json", "agl.branch_reason": "x"}),
        call("b", [4], [5], parent="a", shared=3),
        call("c", [6], [7], attributes={"agl.constrained": "tool"}, status="ERROR"),
    )
    assert shown(built) == [["1", "2", "3", "4", "5*"], ["6", "7"]]
    counts = built.counts()
    assert (counts["calls_constrained"], counts["tokens_dropped_constrained"]) == (1, 2)
    assert (counts["calls_failed"], counts["tokens_dropped_failed"]) == (1, 1)
    assert counts["tokens_made"] == 4 == built.rows.weights.sum() + 3


def test_per_call_is_a_row_for_every_call_with_its_whole_prompt() -> None:
    spans = [
        call("a", [1, 2], [3, 4]),
        call("b", [5], [6, 7], parent="a", shared=4, versions=[(0, 1), (1, 2)]),
        call("c", [8], [9], parent="a", shared=3),
    ]
    built = rows_of(*spans, config=PER_CALL)
    assert shown(built) == [
        ["1", "2", "3*", "4*"],
        ["1", "2", "3", "4", "5", "6*", "7*"],
        ["1", "2", "3", "8", "9*"],
    ]
    assert built.rows.columns["call"].tolist() == [
        *(-1, -1, 0, 0),
        *(-1, -1, 0, 0, -1, 1, 1),
        *(-1, -1, 0, -1, 2),
    ]
    assert built.rows.columns["versions"].tolist()[9:11] == [1, 2]
    assert built.counts()["tokens_merged"] == 0
    assert rows_of(*spans).counts()["tokens_merged"] == 4


def test_interleaved_agents_and_a_compacted_history_are_chains_of_one_tree() -> None:
    built = rows_of(
        call("a1", [1], [2], role="a"),
        call("b1", [50], [51], role="b"),
        call("a2", [3], [4], parent="a1", shared=2, role="a"),
        call("b2", [52], [53], parent="b1", shared=2, role="b"),
        call("a3", [1, 9], [10], role="a"),  # the history told again, shorter
        call("a4", [11], [12], parent="a3", shared=3, role="a"),
    )
    assert shown(built) == [
        ["1", "2*", "3", "4*"],
        ["50", "51*", "52", "53*"],
        ["1", "9", "10*", "11", "12*"],
    ]


def test_nothing_at_all() -> None:
    built = build_rows(table([]), [ATTEMPT, OTHER])
    assert len(built.rows) == 0
    assert built.counts()["rollouts_without_calls"] == 2


def test_a_response_at_the_very_start_is_not_predicted_by_anything() -> None:
    assert shown(rows_of(call("a", [], [1, 2]))) == [["1", "2*"]]


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([call("a", [1], [2], parent="z", shared=1)], "parent_call z"),
        ([call("a", [1], [2]), call("b", [3], [4], parent="a", shared=3)], "parent_tokens 3"),
        (
            [call("a", [1], [2]), call("b", [3], [4], parent="a", prompt_tokens=None)],
            "parent_tokens None",
        ),
        ([call("b", [3], [4], parent="a", shared=1), call("a", [1], [2])], "earlier call"),
        (
            [call("a", [1], [2], attempt=OTHER), call("b", [3], [4], parent="a", shared=1)],
            "same attempt",
        ),
        ([call("a", [1], [2], logprobs=[])], "response_logprobs expected 1"),
        ([call("a", [1], [2, 3], logprobs=[-1, np.nan])], "call a of .* got nan for token 1 of"),
        (
            [call("a", [1], [2, 3]), call("b", [1], [2], attempt=OTHER, logprobs=[-np.inf])],
            "call b of .* got -inf for token 0",
        ),
        ([call("a", [1], [2], prompt_tokens=9)], "prompt_tokens expected 1"),
        ([call("a", [1], [2], versions=[])], "weight_versions expected 1"),
        ([call("a", [1], [2], versions=[(1, 5)])], "start at 0"),
        ([call("a", [1], [2, 3], versions=[(0, 1), (3, 2)])], "rise within"),
        ([call("a", [1], [2], attempt=("ro-9", "at-9"))], "at-9 of rollout ro-9"),
    ],
)
def test_damaged_spans_are_named(spans: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(RunError, match=message):
        rows_of(*spans)


def test_a_call_that_is_not_trained_may_lack_log_probabilities() -> None:
    spans = [
        call("a", [1], [2], logprobs=[np.nan], status="ERROR"),
        call("b", [3], [4, 5], attempt=OTHER),
    ]
    assert shown(rows_of(*spans)) == [["1", "2"], ["3", "4*", "5*"]]
