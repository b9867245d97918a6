"""Muon (Jordan 2024, kellerjordan.github.io/posts/muon; arXiv 2502.16982) for the matrices inside the layers, AdamW for all other weights.

    M <- m M + (1 - m) G,   W <- W - lr (weight_decay W + 0.2 sqrt(max(W.shape)) NS((1 - m) G + m M)),   m = 0.95

NS: five Newton-Schulz steps towards the nearest orthogonal matrix. The factor gives an update the size of AdamW's, so that lr and weight decay are
AdamW's too. torch.optim.Muon takes these steps on what a rank holds and in bfloat16; a sharded matrix has to be whole for them. So here the
momentum stays sharded, each matrix is gathered by all ranks and orthogonalised by each: of one update, a gather of the model's matrices and
products that more ranks do not make faster. In float32 on a CPU (there bfloat16 is no faster), in bfloat16 on a GPU, where it has not been run.
Called by learner/optim.py. Test it alone: tests/unit/test_learner_muon.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from agl_ray.learner import fsdp

UPDATE_RMS = 0.2  # of AdamW's updates, about (2502.16982)


def matrices(model: Any) -> set[torch.nn.Parameter]:
    """The trained weights that Muon is for: of two dimensions, and neither embeddings nor the output head."""
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    others = {module.weight for module in [*tables, model.get_output_embeddings()]}
    return {p for p in model.parameters() if p.requires_grad and p.ndim == 2 and p not in others}


def orthogonalized(matrix: torch.Tensor, group: dict[str, Any], dtype: torch.dtype) -> torch.Tensor:
    """float32, of the shape of `matrix`: singular vectors as they are, singular values near 1. group: torch's settings of Muon."""
    first, second, third = group["ns_coefficients"]
    tall = matrix.shape[0] > matrix.shape[1]
    wide = (matrix.T if tall else matrix).to(dtype)
    wide = wide / wide.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = wide @ wide.T
        wide = first * wide + (second * gram + third * gram @ gram) @ wide
    return (wide.T if tall else wide).float()


class ShardedMuon(torch.optim.Muon):
    """torch's Muon of parameters that may be sharded (all ranks call `step`)."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        momentum = state["momentum_buffer"]
        momentum.lerp_(grad, 1 - group["momentum"])
        whole = fsdp.whole(grad.lerp(momentum, group["momentum"]))
        dtype = torch.bfloat16 if whole.is_cuda else torch.float32
        update = fsdp.part_like(orthogonalized(whole, group, dtype), parameter)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        size = UPDATE_RMS * max(parameter.shape) ** 0.5
        parameter.add_(update, alpha=-group["lr"] * size)


class MuonAndAdamW(torch.optim.Optimizer):
    """Both as one optimiser: the parameter groups and the state are those of the two."""

    def __init__(self, muon: ShardedMuon, adamw: torch.optim.AdamW) -> None:
        self._parts = (muon, adamw)
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """Groups and state are the same objects on both sides, also after a checkpoint brought new ones."""
        muon, adamw = self._parts
        count = len(muon.param_groups)
        muon.param_groups, adamw.param_groups = self.param_groups[:count], self.param_groups[count:]
        muon.state = adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for part in self._parts:
            part.step()
