"""Checkpoints of the learner: parameters, optimiser, random state, counters, by torch.distributed.checkpoint.

Written by all ranks into a folder `.NAME.partial`, which is renamed to NAME when all are done: a killed save never looks
complete. A checkpoint of any number of ranks is read by any other. Called by learner/step.py. Test it alone with
tests/integration/test_learner_ranks.py.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from agl_ray.learner import fsdp
from agl_ray.learner.export import new_partial, put_in_place
from agl_ray.types.errors import InputError

POSITION = "position.json"


def save(
    path: str | Path, model: Any, optimizer: torch.optim.Optimizer, position: dict[str, Any]
) -> None:
    """Write a checkpoint; all ranks call it with the same `path`, on a file system that they share. `position`: counters and numbers kept, as JSON."""
    target, first = Path(path), _rank() == 0
    partial = target.with_name(f".{target.name}.partial")
    if first:
        new_partial(target)
    fsdp.barrier()
    state: dict[str, Any] = {
        "model": get_model_state_dict(model),
        _rng_key(): torch.get_rng_state(),
    }
    if optimizer.state:  # asking a fresh optimiser for its state would make it take a step
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    with _alone_is_fine():
        dcp.save(state, storage_writer=dcp.FileSystemWriter(partial))
    if first:
        (partial / POSITION).write_text(json.dumps(position))
        put_in_place(partial, target)
    fsdp.barrier()


def load(path: str | Path, model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore model, optimiser and this rank's random state in place; returns the position. InputError where `path` is no complete checkpoint."""
    folder = Path(path)
    if not (folder / POSITION).is_file():
        raise InputError(
            f"checkpoint {folder}: expected a folder with {POSITION}, found none; it is not a checkpoint, or its saving was interrupted"
        )
    reader = dcp.FileSystemReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    state: dict[str, Any] = {"model": get_model_state_dict(model)}
    if any(key.startswith("optimizer.") for key in stored):
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    if _rng_key() in stored:
        state[_rng_key()] = torch.get_rng_state()
    with _alone_is_fine():
        dcp.load(state, storage_reader=reader)
    set_model_state_dict(model, state["model"])
    if "optimizer" in state:
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    if _rng_key() in state:
        torch.set_rng_state(state[_rng_key()])
    position: dict[str, Any] = json.loads((folder / POSITION).read_text())
    return position


def load_model_only(path: str | Path, model: Any) -> None:
    """Restore the model alone in place (all ranks call it), as a reference to compare with. InputError where the checkpoint is of another model."""
    state = {"model": get_model_state_dict(model)}
    try:
        with _alone_is_fine():
            dcp.load(state, storage_reader=dcp.FileSystemReader(Path(path)))
    except (RuntimeError, ValueError, CheckpointException) as error:
        cause = " ".join(str(error).split())[:200]
        raise InputError(
            f"checkpoint {path}: expected one of this run's model, it is of another one: {cause}"
        ) from error
    set_model_state_dict(model, state["model"])


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    """One rank without a process group is on purpose; torch warns of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _rng_key() -> str:
    return f"rng_{_rank()}"
