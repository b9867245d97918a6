"""Every policy loss and every correction against a transcription of the paper in float64, token by token, with gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from loss_streams import Streams, inputs_of, random_streams

from agl_ray.algorithms.algorithm import make_algorithm
from agl_ray.config.algorithm import PRESETS, AlgorithmConfig

Gains = Callable[[Streams, Streams, AlgorithmConfig], list[float]]
"""(streams, the same before they were bumped: what a stop-gradient sees, config) -> gain of every token"""


def counted_sums(values: list[float], streams: Streams) -> list[float]:
    """Of every token: the sum of `values` over the counted tokens of its row."""
    rows: dict[int, list[float]] = {}
    for value, row, weight in zip(values, streams["sequence"], streams["weights"], strict=True):
        rows.setdefault(int(row), []).extend([value] if weight else [])
    sums = {row: math.fsum(mine) for row, mine in rows.items()}
    return [sums[int(row)] for row in streams["sequence"]]


def counted_means(values: list[float], streams: Streams) -> list[float]:
    counts = counted_sums([1.0] * len(values), streams)
    return [s / n if n else 0.0 for s, n in zip(counted_sums(values, streams), counts, strict=True)]


def differences(streams: Streams, one: str, other: str) -> list[float]:
    return (streams[one] - streams[other]).tolist()


def clip(s: Streams, fixed: Streams, c: AlgorithmConfig) -> list[float]:
    out = []
    for log_r, a in zip(differences(s, "logprobs", "old_logprobs"), s["advantages"], strict=True):
        r = math.exp(log_r)
        gain = min(r * a, min(max(r, 1 - c.clip_low), 1 + c.clip_high) * a)
        if c.dual_clip is not None and a < 0:
            gain = max(gain, c.dual_clip * a)
        out.append(gain)
    return out


def gspo(s: Streams, fixed: Streams, c: AlgorithmConfig) -> list[float]:
    means = counted_means(differences(fixed, "logprobs", "old_logprobs"), s)
    out = []
    for mean, now, was, a in zip(
        means, s["logprobs"], fixed["logprobs"], s["advantages"], strict=True
    ):
        ratio = math.exp(mean) * math.exp(now - was)
        out.append(min(ratio * a, min(max(ratio, 1 - c.clip_low), 1 + c.clip_high) * a))
    return out


def gmpo(s: Streams, fixed: Streams, c: AlgorithmConfig) -> list[float]:
    logs = [
        min(x, c.clip_high) if a >= 0 else max(x, -c.clip_low)
        for x, a in zip(differences(s, "logprobs", "old_logprobs"), s["advantages"], strict=True)
    ]
    means = counted_means(logs, s)
    return [a * math.exp(mean) for mean, a in zip(means, s["advantages"], strict=True)]


def cispo(s: Streams, fixed: Streams, c: AlgorithmConfig) -> list[float]:
    ratios = np.exp(fixed["logprobs"] - fixed["old_logprobs"])
    weights = np.clip(ratios, 1 - c.clip_low, 1 + c.clip_high)
    return (weights * s["advantages"] * s["logprobs"]).tolist()


def sapo(s: Streams, fixed: Streams, c: AlgorithmConfig) -> list[float]:
    out = []
    for log_r, a in zip(differences(s, "logprobs", "old_logprobs"), s["advantages"], strict=True):
        tau = c.sapo_tau_positive if a > 0 else c.sapo_tau_negative
        out.append(4 / tau / (1 + math.exp(-tau * (math.exp(log_r) - 1))) * a)
    return out


def dppo(s: Streams, fixed: Streams, c: AlgorithmConfig) -> list[float]:
    out = []
    for now, was, mu, a in zip(
        s["logprobs"], fixed["logprobs"], s["engine_logprobs"], s["advantages"], strict=True
    ):
        far = (math.exp(was) - math.exp(mu)) * math.copysign(1, a) > c.dppo_bound
        out.append(0.0 if far else math.exp(now - mu) * a)
    return out


def topr(s: Streams, fixed: Streams, c: AlgorithmConfig) -> list[float]:
    sums = counted_sums(differences(fixed, "logprobs", "engine_logprobs"), s)
    return [
        (1.0 if a > 0 else min(1.0, math.exp(total))) * a * now
        for total, now, a in zip(sums, s["logprobs"], s["advantages"], strict=True)
    ]


def clip_cov(s: Streams, fixed: Streams, c: AlgorithmConfig) -> list[float]:
    gains = zip(clip(s, fixed, c), s["chosen"], strict=True)
    return [0.0 if chosen else gain for gain, chosen in gains]


def kl_cov(s: Streams, fixed: Streams, c: AlgorithmConfig) -> list[float]:
    logs = differences(s, "logprobs", "old_logprobs")
    return [
        math.exp(log_r) * a - (c.kl_cov_coefficient * abs(log_r) if chosen else 0.0)
        for log_r, a, chosen in zip(logs, s["advantages"], s["chosen"], strict=True)
    ]


BY_HAND: dict[str, Gains] = {
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
    "clip": clip,
    "gspo": gspo,
    "gmpo": gmpo,
    "cispo": cispo,
    "sapo": sapo,
    "dppo": dppo,
    "topr": topr,
}


def corrections(s: Streams, c: AlgorithmConfig) -> list[float]:
    logs = differences(s, "old_logprobs", "engine_logprobs")
    out = []
    for log_k, total, average in zip(
        logs, counted_sums(logs, s), counted_means(logs, s), strict=True
    ):
        k, whole, mean = math.exp(log_k), math.exp(total), math.exp(average)
        out.append(
            {
                "none": 1.0,
                "importance": k,
                "tis": min(k, c.tis_cap),
                "icepop": k if c.icepop_low <= k <= c.icepop_high else 0.0,
                "seq-tis": min(whole, c.tis_cap),
                "seq-mask": 1.0 if c.icepop_low <= whole <= c.icepop_high else 0.0,
                "geometric-mask": 1.0 if abs(mean - 1) <= c.geometric_band else 0.0,
            }[c.correction]
        )
    return out


def loss_by_hand(s: Streams, fixed: Streams, c: AlgorithmConfig) -> float:
    parts = zip(
        s["weights"], s["scale"], corrections(s, c), BY_HAND[c.loss](s, fixed, c), strict=True
    )
    return -math.fsum(w * scale * k * gain for w, scale, k, gain in parts)


def check(streams: Streams, config: AlgorithmConfig) -> None:
    """Loss and gradient (by central differences of the transcription) to 1e-6."""
    expected = loss_by_hand(streams, streams, config)
    inputs = inputs_of(streams)
    outputs = make_algorithm(config).loss(inputs)
    assert outputs.loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    outputs.loss.backward()
    assert inputs.logprobs.grad is not None
    for index in range(0, len(streams["logprobs"]), 19):
        moved = []
        for sign in (1, -1):
            bumped = {**streams, "logprobs": streams["logprobs"].copy()}
            bumped["logprobs"][index] += sign * 1e-6
            moved.append(loss_by_hand(bumped, streams, config))
        slope = (moved[0] - moved[1]) / 2e-6
        assert inputs.logprobs.grad[index].item() == pytest.approx(slope, rel=1e-5, abs=1e-6)


WITHOUT_TEACHER = sorted(PRESETS.keys() - {"opd"})
"""opd is clip with advantages of tokens: test_algorithms_opd.py."""


@pytest.mark.parametrize("name", WITHOUT_TEACHER)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_loss_of_every_preset(name: str, seed: int) -> None:
    check(random_streams(seed), AlgorithmConfig(name=name))


@pytest.mark.parametrize(
    ("correction", "mismatch"),
    [
        ("none", 1.2),
        ("importance", 1.2),
        ("tis", 1.2),
        ("icepop", 1.2),
        ("seq-tis", 0.3),
        ("seq-mask", 0.3),
        ("geometric-mask", 0.05),
    ],
)
def test_every_correction(correction: str, mismatch: float) -> None:
    streams = random_streams(2, rows=30, mismatch=mismatch)
    config = AlgorithmConfig.model_validate({"correction": correction})
    check(streams, config)
    if correction.endswith("mask"):
        assert set(corrections(streams, config)) == {0.0, 1.0}  # some are masked and some are not


def test_dual_clip_bounds_what_a_negative_advantage_may_do() -> None:
    streams = random_streams(3, spread=2.0)
    check(streams, AlgorithmConfig(dual_clip=3.0, correction="none"))
    plain = loss_by_hand(streams, streams, AlgorithmConfig(correction="none"))
    bounded = loss_by_hand(streams, streams, AlgorithmConfig(dual_clip=3.0, correction="none"))
    assert bounded < plain


def test_a_token_that_does_not_count_changes_nothing() -> None:
    streams = random_streams(4)
    off = streams["weights"] == 0
    for name in WITHOUT_TEACHER:
        algorithm = make_algorithm(AlgorithmConfig(name=name))
        before = algorithm.loss(inputs_of(streams)).loss.item()
        other = {**streams, "logprobs": np.where(off, -3.0, streams["logprobs"])}
        assert algorithm.loss(inputs_of(other)).loss.item() == before
