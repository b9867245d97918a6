"""Checkpoints of the learner: parameters, optimiser, those of the critic, random state, counters, by torch.distributed.checkpoint.

Written by all ranks into a folder `.NAME.partial`, which is renamed to NAME when all are done: a killed save never looks
complete. A checkpoint of any number of ranks is read by any other. With learner.lora it holds the adapters alone, and is refused where the
base model or the adapters' shape is another. Called by learner/step.py. Test it alone with
tests/integration/test_learner_ranks.py.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from agl_ray.learner import fsdp, lora
from agl_ray.learner.export import new_partial, put_in_place
from agl_ray.types.errors import InputError

POSITION = "position.json"
ADAPTERS = "adapters"  # key of the position: `lora.identity`, None where all weights are trained
Part = tuple[Any, torch.optim.Optimizer]
"""A model and its optimiser."""


def save(
    path: str | Path,
    model: Any,
    optimizer: torch.optim.Optimizer,
    position: dict[str, Any],
    critic: Part | None = None,
) -> None:
    """Write a checkpoint; all ranks call it with the same `path`, on a file system that they share. `position`: counters and numbers kept, as JSON."""
    target, first = Path(path), _rank() == 0
    partial = target.with_name(f".{target.name}.partial")
    if first:
        new_partial(target)
    fsdp.barrier()
    state = {**_state_of(model, optimizer), _rng_key(): torch.get_rng_state()}
    if critic is not None:
        state["critic"] = _state_of(*critic)
    with _alone_is_fine():
        dcp.save(state, storage_writer=dcp.FileSystemWriter(partial))
    identity = lora.identity(model)
    if first:
        (partial / POSITION).write_text(json.dumps({**position, ADAPTERS: identity}))
        put_in_place(partial, target)
    fsdp.barrier()


def load(
    path: str | Path, model: Any, optimizer: torch.optim.Optimizer, critic: Part | None = None
) -> dict[str, Any]:
    """Restore model, optimiser, critic and this rank's random state in place; returns the position. InputError where `path` is no complete
    checkpoint, or has no critic."""
    folder = Path(path)
    if not (folder / POSITION).is_file():
        raise InputError(
            f"checkpoint {folder}: expected a folder with {POSITION}, found none; it is not a checkpoint, or its saving was interrupted"
        )
    position: dict[str, Any] = json.loads((folder / POSITION).read_text())
    if position.get("backend", "native") != "native":
        raise InputError(
            f"checkpoint {folder}: expected one of learner.backend native, got {position['backend']}; resume with what wrote it"
        )
    lora.check_same(folder, position.pop(ADAPTERS, None), lora.identity(model))
    reader = dcp.FileSystemReader(folder)
    stored = reader.read_metadata().state_dict_metadata.keys()
    state = _state_of(model, optimizer, _has(stored, "optimizer."))
    _only_stepped(state, stored)
    if critic is not None:
        if not _has(stored, "critic."):
            raise InputError(
                f"checkpoint {folder}: expected a critic, found none; it is of a run whose algorithm.advantage had no critic"
            )
        state["critic"] = _state_of(*critic, _has(stored, "critic.optimizer."))
    if _rng_key() in stored:
        state[_rng_key()] = torch.get_rng_state()
    with _alone_is_fine():
        dcp.load(state, storage_reader=reader)
    _put_back(model, optimizer, state)
    if critic is not None:
        _put_back(*critic, state["critic"])
    if _rng_key() in state:
        torch.set_rng_state(state[_rng_key()])
    return position


def load_model_only(path: str | Path, model: Any) -> None:
    """Restore the model alone in place (all ranks call it), as a reference to compare with. InputError where the checkpoint is of another model."""
    if json.loads((Path(path) / POSITION).read_text()).get(ADAPTERS) is not None:
        raise InputError(
            f"checkpoint {path}: expected one of all weights, it holds adapters only (learner.lora); give an export of that run"
        )
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


def _state_of(
    model: Any, optimizer: torch.optim.Optimizer, stepped: bool | None = None
) -> dict[str, Any]:
    """stepped: whether the optimiser has a state; None where it is to be asked."""
    state: dict[str, Any] = {"model": _trained_state(model)}
    # Asking a fresh optimiser for its state would make it take a step.
    if bool(optimizer.state) if stepped is None else stepped:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    return state


def _only_stepped(state: dict[str, Any], stored: Iterable[str]) -> None:
    """Leave out what the optimiser has not moved yet in the checkpoint: adapters of roles that had no row so far."""
    if "optimizer" in state:
        prefix = "optimizer.state."
        moved = {
            key.removeprefix(prefix).rpartition(".")[0] for key in stored if key.startswith(prefix)
        }
        found = state["optimizer"]["state"]
        state["optimizer"]["state"] = {name: of for name, of in found.items() if name in moved}


def _put_back(model: Any, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    whole = StateDictOptions(strict=not lora.has_adapters(model))
    set_model_state_dict(model, state["model"], options=whole)
    if "optimizer" in state:
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=whole)


def _has(stored: Iterable[str], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in stored)


def _trained_state(model: Any) -> dict[str, Any]:
    """The tensors that training changes. By name: torch's own choice by requires_grad would keep a frozen tied head."""
    state: dict[str, Any] = get_model_state_dict(model)
    if not lora.has_adapters(model):
        return state
    return {name: tensor for name, tensor in state.items() if lora.is_adapter(name)}


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
