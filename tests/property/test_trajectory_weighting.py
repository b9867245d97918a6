"""What a token weighs in the gradient does not depend on how its rollout was cut into rows, unless that is asked for."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from learner_data import random_batch

from agl_ray.algorithms.algorithm import make_algorithm
from agl_ray.config.models import AlgorithmConfig, LearnerConfig
from agl_ray.config.trajectory import TrajectoryConfig
from agl_ray.learner.prepare import lay_out
from agl_ray.trajectory.batch import TrainBatch

AGGREGATIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)
Weights = dict[float, float]


def laid_out(
    seed: int, rows: str, algorithm: dict[str, Any], most: int = 1000
) -> tuple[Weights, dict[str, float]]:
    """scale * advantage of every trained token, by its engine log-probability (random, so it tells them apart); and the step's stats."""
    spans, batch = random_batch(seed)
    trajectory = TrajectoryConfig.model_validate({"rows": rows, "overlong": "truncate"})
    config = LearnerConfig(tokens_per_microbatch=30, max_row_tokens=most)
    made = make_algorithm(AlgorithmConfig.model_validate(algorithm))
    (payload,) = lay_out(spans, batch, made, config, world_size=1, seed=0, trajectory=trajectory)
    weights: Weights = {}
    for micro in payload.updates[0].micros if payload.updates else []:
        here = micro.weights > 0
        product = micro.columns["scale"].astype(np.float64) * micro.columns["advantages"]
        found = dict(
            zip(
                micro.columns["engine_logprobs"][here].tolist(),
                product[here].tolist(),
                strict=True,
            )
        )
        assert not weights.keys() & found.keys()  # no token counts twice
        weights |= found
    return weights, dict(payload.stats)


def told_apart(seed: int) -> bool:
    """Whether no two tokens have the same log-probability by chance (of float32 there are not that many)."""
    found = [p for span in random_batch(seed)[0].to_pylist() for p in span["response_logprobs"]]
    return len(set(found)) == len(found)


def by_hand(seed: int, aggregation: str) -> Weights:
    """The same in float64 from the spans alone: no rows anywhere."""
    spans, batch = random_batch(seed)
    tokens: defaultdict[str, list[float]] = defaultdict(list)
    for span in spans.to_pylist():
        tokens[span["rollout_id"]] += span["response_logprobs"]
    total = sum(map(len, tokens.values()))
    norm = AlgorithmConfig().norm_tokens
    weights: Weights = {}
    for rollout, advantage in advantages(batch).items():
        scale = {
            "token-mean": 1 / total,
            "token-sum": 1.0,
            "seq-mean-token-mean": 1 / len(tokens) / len(tokens[rollout]),
            "seq-mean-token-sum": 1 / len(tokens),
            "seq-mean-token-sum-norm": 1 / len(tokens) / norm,
        }[aggregation]
        weights |= dict.fromkeys(tokens[rollout], scale * advantage)
    return weights


def advantages(batch: TrainBatch) -> dict[str, float]:
    found = {}
    for group in batch.groups:
        rewards = [member.reward for member in group.members]
        equal = len(set(rewards)) == 1
        mean = math.fsum(rewards) / len(rewards)
        found |= {m.rollout_id: 0.0 if equal else m.reward - mean for m in group.members}
    return found


def close(got: Weights, expected: Weights) -> None:
    for token in got.keys() | expected.keys():  # a token of no weight need not be there
        assert got.get(token, 0.0) == pytest.approx(expected.get(token, 0.0), abs=1e-9, rel=1e-6)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from(AGGREGATIONS))
def test_every_cut_gives_the_same_weights_by_token_and_by_rollout(
    seed: int, aggregation: str
) -> None:
    assume(told_apart(seed))
    expected = by_hand(seed, aggregation)
    for rows in ("merge-prefix", "per-call", "tree"):
        weights, _ = laid_out(seed, rows, {"aggregation": aggregation})
        close(weights, expected)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 25), st.sampled_from(AGGREGATIONS))
def test_so_do_rows_that_are_cut_for_their_length(seed: int, most: int, aggregation: str) -> None:
    assume(told_apart(seed))
    merged, ours = laid_out(seed, "merge-prefix", {"aggregation": aggregation}, most)
    close(laid_out(seed, "per-call", {"aggregation": aggregation}, most)[0], merged)
    assert ours["tokens_made"] == ours["tokens_of_batch"] + ours["tokens_dropped_overlong"]


def test_by_row_it_depends_on_the_cut_since_that_is_asked_for() -> None:
    algorithm = {"aggregation": "seq-mean-token-mean", "unit": "row"}
    merged, merged_stats = laid_out(3, "merge-prefix", algorithm)
    per_call, per_call_stats = laid_out(3, "per-call", algorithm)
    assert merged.keys() == per_call.keys()
    assert Counter(merged.values()) != Counter(per_call.values())
    assert per_call_stats["rows"] > merged_stats["rows"]
    assert per_call_stats["tokens_merged"] == 0 < merged_stats["tokens_merged"]
