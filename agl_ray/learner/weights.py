"""The model's weights whole and under the names of a Hugging Face checkpoint, for the engines and for export.

With one adapter per role (`learner.lora.per_role`) the engines get no whole weights but the adapters (`delivered`): they have the base
model from its folder, and one of them answers for several roles. These few tensors travel as the whole weights do, by the same
manifest, checksums and transports, so that there is one way to deliver a version and one place where it can fail.

Called by actors/learner.py (staging) and learner/export.py. Test it alone with tests/unit/test_learner_export.py.
"""

from __future__ import annotations

from typing import Any

import torch

from agl_ray.learner import fsdp, lora


def delivered(model: Any, *, keep: bool = True) -> list[tuple[str, torch.Tensor]]:
    """What the engines are sent of a version: `full_state`, or `ROLE/NAME` of every tensor of every role's adapter, by peft's names.

    A collective: all ranks call it, those with `keep` False get []."""
    if not lora.roles_of(model):
        return full_state(model, keep=keep)
    states = lora.adapter_states(model, keep=keep)
    return [
        (f"{role}/{name}", tensor)
        for role, state in states.items()
        for name, tensor in state.items()
    ]


def full_state(
    model: Any, *, keep: bool = True, role: str | None = None
) -> list[tuple[str, torch.Tensor]]:
    """(name, CPU tensor) of every weight, the same order every time: what vLLM's `load_weights` takes.

    A collective: all ranks call it, those with `keep` False get []. Parameters are float32 copies. A tied tensor comes once, under the name of
    the first module that holds it. Adapters (learner.lora; that of `role`) come merged into the weights that they change, under the base model's names.
    One tensor is gathered at a time.
    """
    state: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen or lora.is_adapter(name):
            continue
        seen.add(id(tensor))
        base_name, merged = lora.merged(model, name, tensor.detach(), role)
        full = fsdp.whole(merged)
        if keep:
            state[base_name] = full.to("cpu", copy=True)
    return list(_checkpoint_names(model, state).items()) if keep else []


def _checkpoint_names(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers 5 renames and fuses some weights (experts) on loading; checkpoints and vLLM know the names from before."""
    from transformers.core_model_loading import revert_weight_conversion

    reverted: dict[str, torch.Tensor] = revert_weight_conversion(model, state)
    return {name: _own(tensor) for name, tensor in reverted.items()}


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` with memory of its own: one expert cut out of the fused tensor would keep all of them alive."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
