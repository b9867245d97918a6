"""Sharding over ranks (FSDP2) and the ranks' process group. With one rank there is neither, unless its weights lie in the machine's memory.

`learner.cpu_offload` is FSDP2's CPUOffloadPolicy: weights, gradients and the optimiser's state lie in the machine's memory (pinned), each layer's
weights are copied to the GPU for its turn, and the update runs on the CPU. What of it runs without a GPU is tested; it has not been run on one.

The one file that knows torch's FSDP2 (tested with torch 2.13). Called by learner/step.py and, for the group, by actors/learner.py. Test it
alone with tests/integration/test_learner_ranks.py, which starts two real processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from agl_ray.learner.recompute import decoder_layers
from agl_ray.types.errors import ConfigError


def join_group(
    rank: int,
    world_size: int,
    address: str,
    port: int,
    device: str,
    seconds: float,
    offload: bool = False,
) -> None:
    """Join the ranks' group; every collective of it fails after `seconds`, or at once when a Gloo peer's process is gone. offload: the group
    also adds up tensors in the machine's memory (`learner.cpu_offload`)."""
    dist.init_process_group(
        backend_of(device, offload),
        init_method=f"tcp://{address}:{port}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=seconds),
    )


def backend_of(device: str, offload: bool = False) -> str:
    """Torch's name for what carries the collectives."""
    if not device.startswith("cuda"):
        return "gloo"
    return "cpu:gloo,cuda:nccl" if offload else "nccl"


def leave_group() -> None:
    """Leave the group, if in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for the other ranks, for at most the group's deadline; nothing where there is no group."""
    if dist.is_initialized():
        dist.barrier()


def loading_device(device: str, offload: bool) -> str:
    """Where a model that computes on `device` is loaded to. ConfigError where its weights cannot lie elsewhere, since it computes on a CPU."""
    if offload and not device.startswith("cuda"):
        raise ConfigError(
            f"learner.cpu_offload keeps weights out of a GPU's memory: expected a GPU to compute on, got {device}, where they are in the machine's "
            "memory anyway; leave it out"
        )
    return "cpu" if offload else device


def shard(model: Any, dtype: torch.dtype, device: str | None = None, offload: bool = False) -> None:
    """Shard `model` in place over the group: each decoder layer, then the rest. `dtype` is the compute format; parameters and reductions stay float32.

    device: where it computes, None: where it is. offload: its shards, their gradients and what an optimiser makes of them stay in the machine's memory.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )

    kind = torch.device(device or model.device).type
    mesh = init_device_mesh(kind, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    if dtype == torch.float32:
        policy = MixedPrecisionPolicy()
    # Only with a GPU does torch pin memory, and only its copies gain by it.
    where = CPUOffloadPolicy(pin_memory=kind == "cuda") if offload else OffloadPolicy()
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=where)
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=where)


def device_of(model: Any) -> torch.device:
    """Where `model` computes, which may be elsewhere than where its weights are (`learner.cpu_offload`)."""
    parameter = next(model.parameters())
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None or mesh.device_type == parameter.device.type:
        return torch.device(parameter.device)
    return torch.device(mesh.device_type, torch.cuda.current_device())


@contextmanager
def compute_in(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """The forward pass in `dtype`: FSDP does it itself where the model is sharded, autocast where it is not."""
    sharded = dist.is_initialized()
    kind = device_of(model).type
    with torch.autocast(kind, dtype, enabled=not sharded and dtype != torch.float32):
        yield


def add_over_ranks(values: torch.Tensor, largest: bool = False) -> torch.Tensor:
    """`values` summed over the ranks (or the largest of each), on every rank."""
    if dist.is_initialized():
        dist.all_reduce(values, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return values


def gather_columns(values: torch.Tensor) -> tuple[int, torch.Tensor]:
    """`values` [F, k], of another k on every rank, side by side in the order of the ranks; and at which column this rank's begin."""
    if not dist.is_initialized():
        return 0, values
    width = torch.tensor([values.shape[1]], device=values.device)
    widths = [torch.zeros_like(width) for _ in range(dist.get_world_size())]
    dist.all_gather(widths, width)
    counts = [int(one) for one in widths]
    padded = torch.nn.functional.pad(values, (0, max(counts) - values.shape[1])).contiguous()
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    cut = [part[:, :count] for part, count in zip(gathered, counts, strict=True)]
    return sum(counts[: dist.get_rank()]), torch.cat(cut, dim=1)


def part_like(tensor: torch.Tensor, sharded: torch.Tensor) -> torch.Tensor:
    """This rank's part of a whole `tensor` that all ranks have, sharded as `sharded` is; itself where that is not. Nothing is sent."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(sharded, DTensor):
        return tensor
    return distribute_tensor(tensor, sharded.device_mesh, sharded.placements, src_data_rank=None)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered from all ranks (all must call); any other as it is."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()
