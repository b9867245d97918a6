"""Adapters of roles inside vLLM's worker: a received version of them put into vLLM's LoRA slots, and looked at there.

Called by agl_ray/weights/vllm_plugin.py. An adapter goes in through vLLM's own loader, as a folder of peft in memory. What the loader passes over
(a layer that vLLM gives no adapter) would leave the base model answering in the adapter's name, without an error; so every tensor is
compared afterwards with what lies in the slot that the model computes with. Test: `pytest tests/integration/test_engine_adapters.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from agl_ray.types.errors import WeightSyncError
from agl_ray.weights.scratch import scratch

Tensors = dict[str, torch.Tensor]


def load_adapters(
    runner: Any,
    tensors: Iterable[tuple[str, torch.Tensor]],
    ids: Mapping[str, int],
    settings: Mapping[str, Any],
) -> None:
    """Replace the adapters of all roles. runner: vLLM's model runner. tensors: (`ROLE/NAME`, tensor) by peft's names. ids: role -> the adapter's
    number in vLLM. settings: of peft's adapter_config.json.

    WeightSyncError names the role that was not delivered, is not this engine's, or whose tensor is not in the model afterwards."""
    states: dict[str, Tensors] = {}
    for path, tensor in tensors:
        role, _, name = path.partition("/")
        states.setdefault(role, {})[name] = tensor
    if states.keys() != ids.keys():
        raise WeightSyncError(
            f"expected adapters of the roles {', '.join(sorted(ids))}, got those of {', '.join(sorted(states)) or 'none'}"
        )
    for role, state in states.items():
        try:
            _load(runner, role, ids[role], state, settings)
        except Exception as error:
            raise WeightSyncError(
                f"the adapter of role {role} was not taken by vLLM: {error}"
            ) from error
        _check(runner, role, ids[role], state, settings)


def _load(runner: Any, role: str, number: int, state: Tensors, settings: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file
    from vllm.lora.request import LoRARequest

    folder = scratch(sum(tensor.nbytes for tensor in state.values()))
    try:
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        # Received tensors lie in one piece of memory, which safetensors takes for one tensor.
        save_file(
            {name: one.clone() for name, one in state.items()}, folder / "adapter_model.safetensors"
        )
        runner.add_lora(LoRARequest(role, number, str(folder), load_inplace=True))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check(
    runner: Any, role: str, number: int, state: Tensors, settings: Mapping[str, Any]
) -> None:
    """Every tensor of the adapter is in the adapter's slot of the layer that it is for."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    model = runner.get_model()
    manager = model.lora_manager
    slot = manager.lora_index_to_id.index(number)
    places = {
        part: (layer, i)
        for name, layer in manager.modules.items()
        for i, part in enumerate(manager.packed_modules.get(name) or [name])
    }
    rank = settings["r"]
    scale = settings["lora_alpha"] / (rank**0.5 if settings["use_rslora"] else rank)
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    renames = None if mapper is None else mapper.get_rename_mapper()
    for name, tensor in state.items():
        module, is_a = parse_fine_tuned_lora_name(name, renames)
        layer, i = places.get(module, (None, 0))
        if layer is None:
            raise WeightSyncError(
                f"the adapter of role {role}: vLLM gives no adapter to the layer of {name}; leave it out of learner.lora.target_modules"
            )
        there = (layer.lora_a_stacked if is_a else layer.lora_b_stacked)[i][slot, 0]
        given = tensor.to(there.dtype) * (1.0 if is_a else scale)
        rows, columns = tensor.shape
        if not torch.equal(there[:rows, :columns].cpu(), given):
            raise WeightSyncError(
                f"the adapter of role {role}: vLLM's slot does not hold the delivered values of {name}"
            )
