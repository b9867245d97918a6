"""Sharding over ranks (FSDP2) and the ranks' process group. With one rank there is neither.

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


def join_group(
    rank: int, world_size: int, address: str, port: int, device: str, seconds: float
) -> None:
    """Join the ranks' group; every collective of it fails after `seconds`, or at once when a Gloo peer's process is gone."""
    dist.init_process_group(
        "nccl" if device.startswith("cuda") else "gloo",
        init_method=f"tcp://{address}:{port}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=seconds),
    )


def leave_group() -> None:
    """Leave the group, if in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for the other ranks, for at most the group's deadline; nothing where there is no group."""
    if dist.is_initialized():
        dist.barrier()


def shard(model: Any, dtype: torch.dtype) -> None:
    """Shard `model` in place over the group: each decoder layer, then the rest. `dtype` is the compute format; parameters and reductions stay float32."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    if dtype == torch.float32:
        policy = MixedPrecisionPolicy()
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


@contextmanager
def compute_in(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """The forward pass in `dtype`: FSDP does it itself where the model is sharded, autocast where it is not."""
    sharded = dist.is_initialized()
    with torch.autocast(model.device.type, dtype, enabled=not sharded and dtype != torch.float32):
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


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered from all ranks (all must call); any other as it is."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()
