"""Layout of a step on random batches: every token that counts is in one micro-batch of one rank, ranks keep step."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_data import random_batch

from agl_ray.algorithms.algorithm import make_algorithm
from agl_ray.config.models import AlgorithmConfig, LearnerConfig
from agl_ray.learner.prepare import lay_out
from agl_ray.trajectory.rows import build_rows


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    groups=st.integers(1, 4),
    world_size=st.integers(1, 4),
    minibatches=st.integers(1, 4),
    budget=st.integers(1, 200),
    longest=st.integers(2, 40),
)
def test_every_token_with_signal_is_laid_out_once(
    seed: int, groups: int, world_size: int, minibatches: int, budget: int, longest: int
) -> None:
    spans, batch = random_batch(seed, groups=groups, group_size=3)
    algorithm = make_algorithm(AlgorithmConfig())
    config = LearnerConfig(
        minibatches=minibatches, tokens_per_microbatch=budget, max_row_tokens=longest
    )
    payloads = lay_out(spans, batch, algorithm, config, world_size=world_size, seed=seed)
    built = build_rows(spans, batch.attempts)
    advantages = algorithm.advantages(
        np.array([member.reward for member in batch.members]),
        np.repeat(np.arange(groups), [len(group.members) for group in batch.groups]),
    )
    expected: Counter[tuple[float, ...]] = Counter()
    for row, owner in enumerate(built.attempt):
        part = built.rows.take(np.array([row]))
        if len(part.ids) <= longest and advantages[owner] != 0:
            expected.update(_tokens(part.ids, part.weights, part.columns["engine_logprobs"]))
    got: Counter[tuple[float, ...]] = Counter()
    for payload in payloads:
        for update in payload.updates:
            for micro in update.micros:
                assert micro.num_tokens <= budget or len(micro.rows) == 1
                got.update(
                    _tokens(micro.input_ids[0], micro.weights, micro.columns["engine_logprobs"])
                )
    assert got == expected
    shapes = {tuple(len(update.micros) for update in payload.updates) for payload in payloads}
    assert len(shapes) == 1
    assert len(shapes.pop()) <= minibatches
    assert sum(expected.values()) <= payloads[0].stats["tokens_of_batch"]
    updates = [update for payload in payloads for update in payload.updates]
    scale = (
        np.float32(len(payloads[0].updates)) * np.float32(1 / payloads[0].stats["tokens_of_batch"])
        if updates
        else 0
    )
    for micro in [micro for update in updates for micro in update.micros]:
        np.testing.assert_allclose(micro.columns["scale"][micro.weights != 0], scale, rtol=1e-6)


def _tokens(ids: np.ndarray, weights: np.ndarray, logprobs: np.ndarray) -> list[tuple[float, ...]]:
    """The counted tokens; their random log-probabilities tell them apart."""
    return [
        (int(token), float(logprob))
        for token, weight, logprob in zip(ids, weights, logprobs, strict=True)
        if weight
    ]
