"""AdamW (arXiv 1711.05101) or Muon (learner/muon.py), linear warm-up to a constant rate, clipping by the global norm.

Called by learner/step.py and learner/critic.py. Test it alone with tests/unit/test_learner_step.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from agl_ray.learner import fsdp, lora, muon

if TYPE_CHECKING:
    from agl_ray.config.critic import CriticConfig
    from agl_ray.config.models import LearnerConfig


def make_optimizer(
    model: Any, config: LearnerConfig | CriticConfig, kind: Literal["adamw", "muon"] = "adamw"
) -> torch.optim.Optimizer:
    """Of the parameters that are trained: all, or the adapters alone (learner/lora.py). muon: for the matrices inside the layers, the rest by AdamW."""
    chosen = muon.matrices(model) if kind == "muon" else set()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(
        [parameter for parameter in trained if parameter not in chosen],
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
    )
    if not chosen:
        return adamw
    ordered = [parameter for parameter in trained if parameter in chosen]
    of_matrices = muon.ShardedMuon(ordered, lr=config.lr, weight_decay=config.weight_decay)
    return muon.MuonAndAdamW(of_matrices, adamw)


def learning_rate(config: LearnerConfig | CriticConfig, update: int) -> float:
    """Of optimiser update `update`, counted from 0 over the whole run."""
    return config.lr * min(1.0, (update + 1) / max(1, config.warmup_steps))


def apply_gradients(
    model: Any, optimizer: torch.optim.Optimizer, lr: float, max_norm: float
) -> dict[str | None, torch.Tensor]:
    """One update at `lr`; gradients are cleared. Returns the norms of the gradients before clipping, scalars, equal on all ranks: one, under
    None, or with an adapter per role that of each role, since each is a policy of its own and is clipped alone. An adapter without a
    gradient, whose role had no row, stays as it is."""
    norms = {
        role: fsdp.whole(torch.nn.utils.clip_grad_norm_(trained, max_norm)).detach()
        for role, trained in lora.parts(model).items()
    }
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norms
