"""Random ragged micro-batches for tests of losses: plain float64 arrays, and the LossInputs of them."""

from __future__ import annotations

import numpy as np
import torch

from agl_ray.algorithms.base import LossInputs

Streams = dict[str, np.ndarray]


def random_streams(
    seed: int, rows: int = 12, spread: float = 0.3, mismatch: float = 1.2
) -> Streams:
    """`rows` sequences of 1 to 40 tokens each; one advantage per row, a third of the tokens not counted. chosen: a tenth,
    for the losses that choose tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 41, rows)
    size = int(lengths.sum())
    old = -rng.exponential(2.0, size)
    return {
        "logprobs": old + spread * rng.normal(size=size),
        "old_logprobs": old,
        "engine_logprobs": old + mismatch * rng.normal(size=size),
        "advantages": np.repeat(rng.normal(size=rows), lengths),
        "weights": (rng.random(size) < 0.67).astype(float),
        "scale": rng.random(size),
        "sequence": np.repeat(np.arange(rows), lengths),
        "chosen": rng.random(size) < 0.1,
    }


def inputs_of(streams: Streams, dtype: torch.dtype = torch.float64) -> LossInputs:
    """As the learner gives them; `logprobs` is a leaf with gradient."""
    sequence = torch.tensor(streams["sequence"])
    tensors = {
        name: torch.tensor(value, dtype=torch.bool if name == "chosen" else dtype)
        for name, value in streams.items()
        if name != "sequence"
    }
    tensors["logprobs"].requires_grad_()
    return LossInputs(**tensors, sequence=sequence, num_sequences=int(sequence.max()) + 1)
