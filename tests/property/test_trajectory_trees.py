"""Random call trees: every response token is trained in exactly one row, and rows are what the calls saw and said."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_data import call, table

from agl_ray.config.trajectory import TrajectoryConfig
from agl_ray.trajectory.overlong import fit
from agl_ray.trajectory.ragged import Rows
from agl_ray.trajectory.rows import build_rows

ATTEMPTS = [("ro-1", "at-1"), ("ro-2", "at-2")]


@st.composite
def call_trees(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Calls in order, each a root or sharing a drawn part of any earlier call of its attempt. Every token of the whole table is a different id."""
    spans: list[dict[str, Any]] = []
    lengths: dict[tuple[int, str], int] = {}
    next_id = 0
    for number in range(draw(st.integers(0, 9))):
        owner = draw(st.integers(0, 1))
        earlier = [name for attempt, name in lengths if attempt == owner]
        parent = draw(st.sampled_from([None, *earlier]))
        shared = None
        if parent is not None:
            whole = lengths[owner, parent]
            shared = draw(st.one_of(st.just(whole), st.integers(0, whole)))
        sizes = draw(st.integers(0, 3)), draw(st.integers(0, 4))
        if not shared and sizes[0] == 0:
            sizes = 1, sizes[1]  # a prompt is never empty
        prompt = list(range(next_id, next_id + sizes[0]))
        response = list(range(next_id + sizes[0], next_id + sum(sizes)))
        next_id += sum(sizes)
        cut = draw(st.integers(1, max(1, sizes[1] - 1)))
        versions = [(0, number)] if sizes[1] < 2 else [(0, number), (cut, number + 100)]
        spans.append(
            call(
                f"c{number}", prompt, response, attempt=ATTEMPTS[owner], parent=parent, shared=shared,
                versions=versions if response else [], logprobs=[-float(token) for token in response],
            )
        )  # fmt: skip
        lengths[owner, f"c{number}"] = (shared or 0) + sum(sizes)
    return spans


def sequences(spans: list[dict[str, Any]]) -> dict[tuple[str, str], list[int]]:
    """The whole sequence of every call, token by token."""
    out: dict[tuple[str, str], list[int]] = {}
    for span in spans:
        prefix: list[int] = []
        if span["parent_call"]:
            prefix = out[span["attempt_id"], span["parent_call"]][: span["parent_tokens"]]
        own = span["prompt_ids"] + span["response_ids"]
        out[span["attempt_id"], span["span_id"]] = prefix + own
    return out


@settings(deadline=None, max_examples=300)
@given(call_trees())
def test_rows_against_the_calls_token_by_token(spans: list[dict[str, Any]]) -> None:
    built = build_rows(table(spans), ATTEMPTS)
    rows = built.rows
    whole = sequences(spans)
    ends = np.cumsum(rows.lengths)[:-1]
    texts = [part.tolist() for part in np.split(rows.ids, ends)] if len(rows) else []
    # A row is the sequence of a call of its attempt, and no row is a prefix of another through the links.
    for text, attempt in zip(texts, built.attempt.tolist(), strict=True):
        assert text in [s for (name, _), s in whole.items() if name == ATTEMPTS[attempt][1]]
    for sequence in whole.values():
        assert any(text[: len(sequence)] == sequence for text in texts) or not sequence
    # Ids are all different, so they tell where a token came from.
    made = {
        token: (span["span_id"], place, span)
        for span in spans
        for place, token in enumerate(span["response_ids"])
    }
    assert sorted(rows.ids[rows.weights > 0].tolist()) == sorted(made)
    for token, weight, logprob, version in zip(
        rows.ids,
        rows.weights,
        rows.columns["engine_logprobs"],
        rows.columns["versions"],
        strict=True,
    ):
        if token not in made:
            assert (weight, logprob, version) == (0, 0, -1)
            continue
        _, place, span = made[token]
        assert logprob == -float(token)
        expected = [v for start, v in span["weight_versions"] if start <= place][-1]
        assert version == expected


@settings(deadline=None, max_examples=200)
@given(call_trees(), st.integers(1, 30))
def test_per_call_trains_the_same_tokens_in_longer_rows(
    spans: list[dict[str, Any]], most: int
) -> None:
    merged = build_rows(table(spans), ATTEMPTS)
    built = build_rows(table(spans), ATTEMPTS, TrajectoryConfig(rows="per-call"))
    ends = np.cumsum(built.rows.lengths)[:-1]
    texts = [part.tolist() for part in np.split(built.rows.ids, ends)] if len(built.rows) else []
    assert texts == [sequence for sequence in sequences(spans).values() if sequence]
    assert trained(built.rows) == trained(merged.rows)
    assert merged.counts()["tokens_merged"] == len(built.rows.ids) - len(merged.rows.ids)
    # A token has the same place in every row that holds it, so that cutting leaves the same ones, too.
    cut = TrajectoryConfig(overlong="truncate")
    assert trained(fit(built.rows, most, cut)[0]) == trained(fit(merged.rows, most, cut)[0])


def trained(rows: Rows) -> list[tuple[float, ...]]:
    """What is known of each token that counts, in the order of their ids."""
    columns = (rows.columns[name] for name in sorted(rows.columns))
    every = np.stack([rows.ids, rows.weights, *columns], axis=1)
    return sorted(map(tuple, every[rows.weights > 0].tolist()))
