"""The learner's ranks as one thing: started, stepped, checkpointed and restarted together.

A helper inside the controller, which owns the rank actors. FSDP cannot go on without one of its ranks, so the death of any
rank ends the group (`LearnerLost`), and the controller makes a new one from the last checkpoint.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.learner import LearnerRank, PeerLost
from agl_ray.config import RunConfig
from agl_ray.config.models import LearnerConfig
from agl_ray.learner.verl_env import check_environment, python_of
from agl_ray.store import LightningStore
from agl_ray.trajectory.batch import TrainBatch
from agl_ray.types import RunError, replace
from agl_ray.waits import wait

START = 180.0  # seconds for the ranks to be placed, import torch and load the model
CHECKPOINT = "step-{step:06d}"


def runtime_env(config: LearnerConfig) -> dict[str, Any]:
    """What Ray starts a rank with: for verl the Python of its own environment."""
    made: dict[str, Any] = {"env_vars": {"OMP_NUM_THREADS": "1"}}
    if config.backend == "verl":
        made["py_executable"] = str(python_of(config.verl_env))
    return made


def setup_seconds(config: RunConfig) -> float:
    """Deadline of the ranks' `setup`. A teacher is checked in it; that wait must end first, since it names the teacher."""
    if config.algorithm.teacher is None:
        return START
    from agl_ray.learner.teacher import CHECK_SECONDS

    return START + CHECK_SECONDS


class LearnerLost(RunError):
    """A learner rank died or its collective was aborted; the group must be made again."""


class LearnerGroup:
    """R ranks of `LearnerRank` with one placement group.

    model_path: folder of the base model (version 0). namespace: where the rank actors are named `learner-<rank>`.
    """

    def __init__(
        self, config: RunConfig, model_path: str, namespace: str, run_folder: Path, base: str
    ) -> None:
        self.config, self.model_path, self.namespace = config, model_path, namespace
        self.base = base
        self.checkpoints = run_folder / "checkpoints"
        self.ranks: list[ActorHandle] = []
        self._placement: Any = None
        self._generation = 0

    @property
    def rank0(self) -> ActorHandle:
        return self.ranks[0]

    async def start(self) -> None:
        """Place the ranks, let them meet, load the base model."""
        settings = self.config.learner
        bundle = {"CPU": settings.num_cpus}
        if settings.num_gpus:
            bundle["GPU"] = settings.num_gpus
        self._placement = placement_group([bundle] * settings.world_size, strategy="PACK")
        await wait(
            self._placement.ready(),
            on=f"Ray to place {settings.world_size} learner ranks of {bundle}",
            seconds=START,
            hint="the cluster has too few free CPUs or GPUs",
        )
        if settings.backend == "verl":
            await self._check_environments(settings.verl_env)
        self._generation += 1
        suffix = "" if self._generation == 1 else f"-{self._generation}"
        self.ranks = [
            ray.remote(LearnerRank)
            .options(
                name=f"learner-{rank}{suffix}",
                namespace=self.namespace,
                num_cpus=settings.num_cpus,
                num_gpus=settings.num_gpus,
                max_restarts=0,
                max_concurrency=4,
                scheduling_strategy=self._in_bundle(rank),
                runtime_env=runtime_env(settings),
            )
            .remote(
                rank,
                settings.world_size,
                self.config.model_dump(mode="json"),
                self.model_path,
                self.config.seed,
                self.base,
            )
            for rank in range(settings.world_size)
        ]
        host, port = await self._one(self.rank0.address.remote(), "learner rank 0's address", START)
        await self._all("setup", host, port, seconds=setup_seconds(self.config))

    async def _check_environments(self, folder: str) -> None:
        """On the node of each rank; ConfigError says what is wrong with the environment there."""
        checks = [
            ray.remote(check_environment)
            .options(num_cpus=0, scheduling_strategy=self._in_bundle(rank))
            .remote(folder)
            for rank in range(self.config.learner.world_size)
        ]
        await self._gather(checks, f"the nodes of the learner to look at {folder}", START)

    def _in_bundle(self, rank: int) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(
            placement_group=self._placement, placement_group_bundle_index=rank
        )

    async def load_newest(self, at_most: int) -> int:
        """Load the newest whole checkpoint of a step <= `at_most` and return that step (0: the base model)."""
        found = [
            (int(folder.name.split("-")[1]), folder)
            for folder in self.checkpoints.glob("step-*")
            if folder.name.split("-")[1].isdigit()
        ]
        usable = [entry for entry in found if entry[0] <= at_most]
        if not usable:
            return 0
        step, folder = max(usable)
        await self._all("load", str(folder), seconds=self.config.learner.step_timeout_seconds)
        return step

    async def train(self, batch: TrainBatch, store: LightningStore) -> dict[str, Any]:
        """One step on `batch`: rank 0 makes the rows, every rank trains on its share. Metrics of rank 0 (already global)."""
        limit = self.config.learner.step_timeout_seconds
        on = f"rows of step {batch.step}"
        teacher = self.config.algorithm.teacher
        rows_limit = limit + (teacher.deadline_seconds if teacher else 0.0)
        shares = await self._one(self.rank0.prepare.remote(store, batch), on, rows_limit)
        refs = [rank.train.remote(share) for rank, share in zip(self.ranks, shares, strict=True)]
        metrics = await self._gather(refs, f"update of step {batch.step}", limit)
        return dict(metrics[0])

    async def count_retokenized(
        self, store: LightningStore, attempts: list[tuple[str, str]]
    ) -> int:
        """Tokens of these attempts that the gateway could not keep exact."""
        limit = self.config.learner.step_timeout_seconds
        counted = self.rank0.count_retokenized.remote(store, attempts)
        return int(await self._one(counted, "the spans of a validation to be counted", limit))

    async def measure(self, batch: TrainBatch, store: LightningStore, rounds: int) -> float:
        """Tokens per second through the update alone (forward, backward, optimiser; rows laid out before): `batch` trained
        `rounds` more times; the best."""
        rates = []
        for i in range(rounds):
            metrics = await self.train(replace(batch, step=batch.step + 1 + i), store)
            rates.append(metrics["tokens_forward"] / metrics["seconds_train"])
        return float(max(rates))

    async def stage(self, version: int) -> dict[str, Any]:
        """Gather version `version` on rank 0's CPU for sending; its manifest."""
        manifests = await self._all("stage_weights", version)
        return dict(manifests[0])

    async def save(self, step: int) -> Path:
        """Write the checkpoint of `step`; the folder appears under its name only when it is whole."""
        folder = self.checkpoints / CHECKPOINT.format(step=step)
        await self._all("save", str(folder))
        return folder

    async def export(self, folder: Path) -> None:
        """Write the current weights as a Hugging Face model folder."""
        await self._all("export", str(folder))

    async def _all(self, method: str, *args: Any, seconds: float | None = None) -> list[Any]:
        limit = seconds or self.config.learner.step_timeout_seconds
        refs = [getattr(rank, method).remote(*args) for rank in self.ranks]
        return await self._gather(refs, f"learner ranks to {method}", limit)

    async def _one(self, ref: Awaitable[Any], on: str, seconds: float) -> Any:
        return (await self._gather([ref], on, seconds))[0]

    async def _gather(self, refs: list[Any], on: str, seconds: float) -> list[Any]:
        """All results, or LearnerLost as soon as one rank is dead (the others would wait for it in a collective)."""
        try:
            return list(await wait(asyncio.gather(*refs), on=on, seconds=seconds))
        except (ray.exceptions.RayActorError, PeerLost) as error:
            raise LearnerLost(f"a learner rank died (awaited: {on})") from error

    def kill(self) -> None:
        """End every rank at once and free their place."""
        for rank in self.ranks:
            ray.kill(rank)
        self.ranks = []
        if self._placement is not None:
            remove_placement_group(self._placement)
            self._placement = None
