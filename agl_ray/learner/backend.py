"""Who computes in a learner rank: `learner.backend`. Everything around it (rows, weights on their way, checkpoints' places) is the same.

    native   learner/step.py: torch and our own losses, in the environment that everything runs in
    verl     learner/verl_engine.py: verl's FSDP2 engine and verl's losses, in an environment of its own (learner/verl_env.py)

Called by actors/learner.py. Test it alone with tests/unit/test_learner_backend.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from agl_ray.algorithms.algorithm import Algorithm
    from agl_ray.config.models import RunConfig
    from agl_ray.learner.prepare import Payload


class Backend(Protocol):
    """One rank's model and optimiser. version: the weight version that it holds; 0 is the base model. kept: what the advantage function keeps
    from step to step, as of this version. All ranks call the methods together: they are collectives."""

    version: int
    kept: dict[str, float]

    @property
    def algorithm(self) -> Algorithm:
        """What learner/prepare.py lays the rows out by."""
        ...

    @property
    def num_parameters(self) -> int:
        """Of the whole model, over all ranks."""
        ...

    def train(self, payload: Payload) -> dict[str, float]:
        """Version k to version k + 1 on one rank's payload of step k + 1; the step's metrics, equal on all ranks but for `seconds_*`."""
        ...

    def full_state(self) -> list[tuple[str, torch.Tensor]]:
        """On rank 0 what the engines are sent: names as vLLM loads them, CPU tensors; [] on the others."""
        ...

    def save(self, path: str | Path) -> None:
        """Write the checkpoint folder `path`, whole or not at all."""
        ...

    def load(self, path: str | Path) -> None:
        """Go to the state of a checkpoint. InputError where `path` is none that this backend reads."""
        ...

    def export(self, path: str | Path) -> None:
        """Write a Hugging Face folder."""
        ...


@dataclass(frozen=True, slots=True)
class Rank:
    """Which rank of the group this process is, and where the ranks meet."""

    rank: int
    world_size: int
    address: str
    port: int


def open_backend(
    config: RunConfig, model_path: str | Path, rank: Rank, *, seed: int, base: Path
) -> Backend:
    """The backend that the configuration says, with the base model loaded, and the ranks' group joined where it needs one. base: where files that
    the configuration names are looked up too."""
    return BACKENDS[config.learner.backend](config, Path(model_path), rank, seed, base)


def _device(config: RunConfig) -> str:
    return "cuda" if config.learner.num_gpus else "cpu"


def _join(config: RunConfig, rank: Rank, *, also_cpu: bool) -> None:
    """also_cpu: beside a GPU's collectives the group has those of the machine's memory."""
    from agl_ray.learner import fsdp

    seconds = config.learner.step_timeout_seconds
    meeting = (rank.rank, rank.world_size, rank.address, rank.port)
    fsdp.join_group(*meeting, _device(config), seconds, also_cpu)


def _native(config: RunConfig, model_path: Path, rank: Rank, seed: int, base: Path) -> Backend:
    from agl_ray.learner.step import Learner

    offload = config.learner.cpu_offload
    if rank.world_size > 1 or offload:
        _join(config, rank, also_cpu=offload)
    return Learner(
        config.algorithm,
        config.learner,
        model_path,
        seed=seed,
        rank=rank.rank,
        world_size=rank.world_size,
        device=_device(config),
        base=base,
        roles=config.adapters,
        steps=config.train.steps,
    )


def _verl(config: RunConfig, model_path: Path, rank: Rank, seed: int, base: Path) -> Backend:
    from agl_ray.learner.verl_engine import VerlLearner

    _join(config, rank, also_cpu=True)  # verl's engine asks for a group of one rank too
    return VerlLearner(
        config.algorithm,
        config.learner,
        model_path,
        rank=rank.rank,
        device=_device(config),
        base=base,
        steps=config.train.steps,
    )


BACKENDS: Mapping[str, Callable[[RunConfig, Path, Rank, int, Path], Backend]] = {
    "native": _native,
    "verl": _verl,
}
