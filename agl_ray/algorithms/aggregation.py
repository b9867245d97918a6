"""What every counted token adds to the loss, as one number per token, taken over the whole batch before it is cut up.

    token-mean               1 / N                     N counted tokens of the batch                DAPO, arXiv 2503.14476
    token-sum                1
    seq-mean-token-mean      1 / (S |s|)               S sequences, |s| counted tokens of this one  GRPO, 2402.03300
    seq-mean-token-sum       1 / S
    seq-mean-token-sum-norm  1 / (S norm_tokens)                                                    Dr.GRPO, 2503.20783

A sequence is a rollout, however many rows it was cut into, or with `unit: row` a row. So nothing depends on micro-batches, ranks
or packing. Called by learner/prepare.py. Test alone: tests/unit/test_algorithms_aggregation.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from agl_ray.config.algorithm import AlgorithmConfig


def token_scales(
    counted: npt.NDArray, rollout: npt.NDArray, row: npt.NDArray, config: AlgorithmConfig
) -> npt.NDArray:
    """float64 [N]: the scale of each token, 0 where it does not count.

    counted: [N], not 0 where the token counts. rollout, row: int64 [N], the rollout and the row that the token belongs to.
    """
    counts = counted != 0
    total = int(counts.sum())
    scales = np.zeros(len(counted))
    if total == 0:
        return scales
    if config.aggregation in ("token-mean", "token-sum"):
        scales[counts] = 1.0 if config.aggregation == "token-sum" else 1.0 / total
        return scales
    sequence = rollout if config.unit == "rollout" else row
    _, index, lengths = np.unique(sequence[counts], return_inverse=True, return_counts=True)
    scales[counts] = 1.0 / len(lengths)
    if config.aggregation == "seq-mean-token-mean":
        scales[counts] /= lengths[index]
    elif config.aggregation == "seq-mean-token-sum-norm":
        scales[counts] /= config.norm_tokens
    return scales
