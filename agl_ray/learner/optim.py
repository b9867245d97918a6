"""AdamW (arXiv 1711.05101) or Muon (learner/muon.py), a linear warm-up and a fall of the rate, clipping by the global norm.

Called by learner/step.py, learner/critic.py, learner/verl_engine.py and learner/sft.py. Test it alone with tests/unit/test_learner_optim.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch

from agl_ray.learner import fsdp, lora, muon
from agl_ray.types.errors import ConfigError, RunError

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


FALLEN: Mapping[str, Callable[[float], float]] = {
    "linear": lambda done: done,
    "cosine": lambda done: (1.0 - math.cos(math.pi * done)) / 2,
    "constant": lambda done: 0.0,
}
"""How much of its fall a schedule has behind it when a share `done` of the steps is done."""


def share_left(schedule: str, done: float, final: float) -> float:
    """Of the highest rate, when a share `done` of the steps of the fall is done (beyond 1 as at 1): from 1 to `final`."""
    return 1.0 - (1.0 - final) * FALLEN[schedule](min(1.0, done))


def share_at(config: LearnerConfig, version: int, steps: int | None) -> float:
    """Of the rates of the run, in the step that makes weight version `version + 1` of `steps`. By the version, which a resumed run has again and
    a step without signal makes too; not by updates. ConfigError where the rate falls and `steps` is None."""
    if config.schedule == "constant":
        return 1.0
    if steps is None:
        raise ConfigError(
            f"learner.schedule {config.schedule}: expected the number of training steps (train.steps) over which the rate falls, got none; give "
            "the learner `steps`, or say constant"
        )
    return share_left(config.schedule, version / steps, config.final_lr_share)


def learning_rate(config: LearnerConfig | CriticConfig, update: int, share: float) -> float:
    """Of optimiser update `update`, counted from 0 over the whole run, in a step of this `share_at`."""
    return config.lr * min(1.0, (update + 1) / max(1, config.warmup_steps)) * share


def apply_gradients(
    model: Any, optimizer: torch.optim.Optimizer, lr: float, max_norm: float, of: str = "the model"
) -> dict[str | None, torch.Tensor]:
    """One update at `lr`; gradients are cleared. Returns the norms of the gradients before clipping, scalars, equal on all ranks: one, under
    None, or with an adapter per role that of each role, since each is a policy of its own and is clipped alone. An adapter without a
    gradient, whose role had no row, stays as it is.

    of: whose gradients they are, for messages. RunError on every rank where a norm is not finite; no parameter is changed then."""
    norms = {
        role: fsdp.whole(torch.nn.utils.clip_grad_norm_(trained, max_norm)).detach()
        for role, trained in lora.parts(model).items()
    }
    for role, norm in norms.items():
        check_norm(norm.item(), of if role is None else f"{of} (role {role})")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norms


def check_norm(norm: float, of: str) -> None:
    """RunError where the norm of an update's gradients before clipping is not finite; the update must not have moved a weight, or not move
    one. of: whose gradients they are."""
    if not math.isfinite(norm):  # clipping by it has made every gradient nan
        raise RunError(
            f"{of}: expected a finite gradient norm, got {norm}; no weight was changed by this update. Take a smaller learning rate, or look at "
            "the rows, rewards and log-probabilities of this step, and go on from the newest checkpoint (--resume)"
        )
