"""PPO (arXiv 1707.06347): the clipped gain of grpo.py, with a critic in the place of the group. This file: what the critic learns.

    loss = 1/2 sum_t scale_t w_t max((V_t - R_t)^2, (clip(V_t, V_old_t - c, V_old_t + c) - R_t)^2),   c = `learner.critic.value_clip`

The preset `ppo` is `advantage: gae` (gae.py) with `loss: clip`, clips of 0.2 and `normalize: batch`. `scale_t` is the policy's
(aggregation.py), so the loss does not depend on micro-batches, ranks or packing. A row needs one rollout only (`rollout.group_size: 1`).
Called by learner/critic.py. Test it alone with tests/unit/test_algorithms_gae.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class ValueInputs:
    """Float [T] each. values: the critic's now, with gradient. old_values: at the start of the batch. returns: what they should be.
    weights: 1 where the token counts, else 0. scale: as in LossInputs."""

    values: torch.Tensor
    old_values: torch.Tensor
    returns: torch.Tensor
    weights: torch.Tensor
    scale: torch.Tensor


def value_loss(inputs: ValueInputs, value_clip: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """This micro-batch's share of the loss, a scalar, to be added to the others'; bool [T], where the clipped value counts. None: no clip."""
    import torch

    errors = (inputs.values - inputs.returns) ** 2
    clipped = torch.zeros_like(errors, dtype=torch.bool)
    if value_clip is not None:
        low, high = inputs.old_values - value_clip, inputs.old_values + value_clip
        of_clipped = (inputs.values.clamp(low, high) - inputs.returns) ** 2
        clipped = of_clipped > errors
        errors = torch.maximum(errors, of_clipped)
    return 0.5 * (inputs.weights * inputs.scale * errors).sum(), clipped
