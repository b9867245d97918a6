"""Tokens that a policy loss chooses from all of an update, over micro-batches and ranks (`registry.policy_loss(..., choose=...)`).

Called by learner/step.py before the update's backward passes. Test it alone with tests/unit/test_learner_choice.py. Legend: K counted tokens
of the update on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from agl_ray.algorithms.base import LossInputs, Tokens
from agl_ray.learner import fsdp
from agl_ray.learner.packing import Packed

if TYPE_CHECKING:
    from agl_ray.algorithms.algorithm import Algorithm


def choose(
    algorithm: Algorithm, micros: Sequence[Packed], inputs: Sequence[LossInputs]
) -> list[torch.Tensor]:
    """bool [T] for each micro-batch of this rank. A collective; every rank chooses from the same K tokens, gathered: 32 bytes each."""
    parts = [
        _counted(micro, algorithm.seen(one)) for micro, one in zip(micros, inputs, strict=True)
    ]
    own = torch.cat(parts, dim=1)
    before, everybody = fsdp.gather_columns(own)
    chosen = algorithm.choose(Tokens(*everybody))[before : before + own.shape[1]]
    out = []
    for one, piece in zip(inputs, chosen.split([part.shape[1] for part in parts]), strict=True):
        of_tokens = torch.zeros_like(one.weights, dtype=torch.bool)
        of_tokens[one.weights > 0] = piece
        out.append(of_tokens)
    return out


def _counted(micro: Packed, inputs: LossInputs) -> torch.Tensor:
    """float64 [4, k]: the streams of Tokens, of the counted tokens."""
    draws = torch.tensor(micro.columns["draw"], device=inputs.logprobs.device)
    streams = (inputs.logprobs, inputs.old_logprobs, inputs.advantages, draws)
    return torch.stack([stream.double() for stream in streams])[:, inputs.weights > 0]
