"""What an algorithm is: advantages from rewards, and a loss over a stream of tokens. One file each.

The learner is blind to algorithms: learner/prepare.py calls `advantages` on scalars (numpy), learner/step.py calls
`loss` on every micro-batch (torch). Test one alone with tests/unit/test_algorithms_<name>.py. Legend: M rollouts, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy.typing as npt

if TYPE_CHECKING:
    import torch

    from agl_ray.config.models import AlgorithmConfig


@dataclass(frozen=True, slots=True)
class LossInputs:
    """The streams of one micro-batch, each float32 [T] on the model's device.

    logprobs: log pi, the learner's now, with gradient. old_logprobs: log pi_old, the learner's at the start of the batch.
    engine_logprobs: log mu, the engine's that sampled. advantages: of the rollout that the token belongs to. weights: 1 where the
    token counts, else 0 (there the other streams mean nothing but are finite).
    denominator: what the sum over all tokens of all micro-batches of all ranks is divided by.
    """

    logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    engine_logprobs: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    denominator: float


@dataclass(frozen=True, slots=True)
class LossOutputs:
    """loss: this micro-batch's share, a scalar; the shares of all micro-batches and ranks are added, never averaged.

    sums: scalars without gradient that are added likewise and then divided by the number of counted tokens: the
    step's metrics under these names.
    """

    loss: torch.Tensor
    sums: dict[str, torch.Tensor] = field(default_factory=dict)


class Algorithm(Protocol):
    """`skip_zero_advantage`: a token of advantage 0 adds nothing to the loss, so that its row need not be run forward."""

    skip_zero_advantage: bool

    def advantages(self, rewards: npt.NDArray, group_index: npt.NDArray) -> npt.NDArray:
        """rewards float64 [M], group_index int64 [M] -> advantages float64 [M]. Taken before any row is dropped."""
        ...

    def loss(self, inputs: LossInputs) -> LossOutputs: ...


def make_algorithm(config: AlgorithmConfig) -> Algorithm:
    """The algorithm that the configuration names."""
    from agl_ray.algorithms.grpo import GRPO

    return {"grpo": GRPO}[config.name](config)
