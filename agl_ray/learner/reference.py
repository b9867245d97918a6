"""The reference model: one that never learns, and what its log-probabilities take off the rewards. `algorithm.kl`.

A `Reference` is anything with `logprobs(micro)`. `FrozenModel` is a second model, sharded over the ranks as the policy is. Where only adapters are
trained (learner.lora) the base needs no copy: `AdaptersOff` is the policy without them. Resuming a run changes nothing of either: the one is
read from its own folder, never from the run's checkpoints, the other is never changed. Called by learner/step.py. Test it alone:
tests/unit/test_learner_reference.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from agl_ray.algorithms.kl import estimate
from agl_ray.config.kl import POSITION, reference_folder
from agl_ray.learner import checkpoint, fsdp, lora
from agl_ray.learner.model import load_model
from agl_ray.learner.packing import Packed, token_logprobs
from agl_ray.types.errors import InputError

if TYPE_CHECKING:
    from agl_ray.config.kl import KLConfig
    from agl_ray.learner.prepare import Payload
    from agl_ray.trajectory.ragged import Array

Known = list[list[dict[str, torch.Tensor]]]
"""By update and micro-batch: streams [T] that do not change during the step, under their names in LossInputs."""


class Reference(Protocol):
    """What the policy is compared with."""

    def logprobs(self, micro: Packed) -> torch.Tensor:
        """float32 [T], without gradient: as `packing.token_logprobs`. A collective where there are several ranks."""
        ...


def make_reference(
    config: KLConfig,
    policy: Any,
    model_path: Path,
    base: Path | None,
    dtype: torch.dtype,
    *,
    world_size: int = 1,
    device: str = "cpu",
    offload: bool = False,
) -> Reference | None:
    """The reference that `algorithm.kl` asks for, None where it asks for none. policy: the model that is trained. model_path: the run's base model. base: where the folder that
    `config.reference` names is looked up too."""
    if not config.on:
        return None
    folder = reference_folder(config, base or Path.cwd())
    if folder is None and lora.has_adapters(policy):
        return AdaptersOff(policy, dtype)
    return FrozenModel(
        model_path, folder, dtype=dtype, world_size=world_size, device=device, offload=offload
    )


class AdaptersOff:
    """The base model of a policy that is trained through adapters: the policy itself, to the bit what it was before the first step."""

    def __init__(self, policy: Any, dtype: torch.dtype) -> None:
        self.model, self.dtype = policy, dtype

    @torch.no_grad()
    def logprobs(self, micro: Packed) -> torch.Tensor:
        with lora.adapters_off(self.model), fsdp.compute_in(self.model, self.dtype):
            return token_logprobs(self.model, micro)


class FrozenModel:
    """A model of its own in memory: the one of `model_path`, or of `folder` where that is given, a model folder or a checkpoint of ours. The
    ranks' group must be joined before. InputError where the reference is of another vocabulary, or the checkpoint of another model."""

    def __init__(
        self,
        model_path: Path,
        folder: Path | None,
        *,
        dtype: torch.dtype,
        world_size: int = 1,
        device: str = "cpu",
        offload: bool = False,
    ) -> None:
        saved = folder if folder is not None and (folder / POSITION).is_file() else None
        source = model_path if folder is None or saved else folder
        self.dtype = dtype
        self.model = load_model(source, fsdp.loading_device(device, offload))
        self.model.requires_grad_(False)
        _same_vocabulary(model_path, source)
        if world_size > 1 or offload:
            fsdp.shard(self.model, dtype, device, offload)
        if saved is not None:
            checkpoint.load_model_only(saved, self.model)

    @torch.no_grad()
    def logprobs(self, micro: Packed) -> torch.Tensor:
        with fsdp.compute_in(self.model, self.dtype):
            return token_logprobs(self.model, micro)


def _same_vocabulary(model_path: Path, reference: Path) -> None:
    wanted, got = (
        json.loads((folder / "config.json").read_text()).get("vocab_size")
        for folder in (model_path, reference)
    )
    if got != wanted:
        raise InputError(
            f"algorithm.kl.reference {reference}: expected the run's vocabulary of {wanted} tokens, got {got}; token ids would mean "
            "other things"
        )


def penalties(payload: Payload, known: Known, config: KLConfig) -> Array:
    """float64 [U]: coefficient times the divergence of each unit's trained tokens, under the policy at the start of the step (all ranks call it)."""
    if payload.units is None:
        raise ValueError("Payload.units: expected the units of a late layout, got none")
    sums = torch.zeros(len(payload.units.reward) + 1, dtype=torch.float64)
    for update, streams in zip(payload.updates, known, strict=True):
        for micro, stream in zip(update.micros, streams, strict=True):
            sums.index_add_(0, torch.tensor(micro.columns["unit"]), _of(micro, stream, config))
    device = _device(known)
    added = fsdp.add_over_ranks(sums if device is None else sums.to(device)).cpu().numpy()
    return np.asarray((config.coefficient or 0.0) * added[:-1])


def _of(micro: Packed, stream: Mapping[str, torch.Tensor], config: KLConfig) -> torch.Tensor:
    """float64 [T] on the CPU: each token's divergence, 0 where it is not trained."""
    value = estimate(stream["old_logprobs"], stream["reference_logprobs"], config.estimate)
    return torch.where(torch.tensor(micro.weights) != 0, value.double().cpu(), 0.0)


def _device(known: Sequence[Sequence[Mapping[str, torch.Tensor]]]) -> torch.device | None:
    return next((one["old_logprobs"].device for streams in known for one in streams), None)
