"""Learner ranks as real processes over Gloo, without Ray: `run(world_size, job, ...)` runs one of the JOBS in each and collects what it returns."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from learner_data import branching_batch, call, random_batch, roles_batch, table

from agl_ray.algorithms.algorithm import make_algorithm
from agl_ray.config.models import AlgorithmConfig, LearnerConfig
from agl_ray.config.trajectory import TrajectoryConfig
from agl_ray.learner import fsdp, head, optim
from agl_ray.learner.model import load_model
from agl_ray.learner.prepare import lay_out
from agl_ray.learner.step import Learner
from agl_ray.learner.weights import full_state
from agl_ray.trajectory.batch import GroupPlan, Member, TrainBatch

SECONDS = 120.0  # a rank that takes longer hangs
GROUP_SECONDS = {"die": 20.0}  # deadline of a collective, 60 for the other jobs
ALGORITHM = AlgorithmConfig()
PRELOAD = [
    "agl_ray.learner.step",
    "agl_ray.learner.attention",
    "torch.distributed.fsdp",
    "transformers.models.qwen3.modeling_qwen3",
]


def start(world_size: int, job: str, *args: Any, out: Path) -> list[Any]:
    """The processes of one job, started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")  # imports torch once, not once per process
    context.set_forkserver_preload(PRELOAD)
    processes = [
        context.Process(target=_main, args=(rank, world_size, port, job, args, out), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def run(world_size: int, job: str, *args: Any) -> list[Any]:
    """What the job returns on each rank."""
    with tempfile.TemporaryDirectory() as folder:
        processes = start(world_size, job, *args, out=Path(folder))
        for process in processes:
            process.join(SECONDS)
        codes = [process.exitcode for process in processes]
        assert codes == [0] * world_size, f"exit codes of the ranks: {codes}"
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world_size)]


def _main(
    rank: int, world_size: int, port: int, job: str, args: tuple[Any, ...], out: Path
) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        fsdp.join_group(rank, world_size, "127.0.0.1", port, "cpu", GROUP_SECONDS.get(job, 60.0))
    result = JOBS[job](rank, world_size, *args)
    torch.save(result, out / f"{rank}.pt")
    fsdp.leave_group()


def train(learner: Learner, steps: range, minibatches: int = 1) -> list[dict[str, float]]:
    """Metrics of these steps on made-up batches, the same for every world size."""
    rows = []
    config = learner.config
    for step in steps:
        spans, batch = random_batch(9, step=step)
        payloads = lay_out(
            spans, batch, learner.algorithm, config, world_size=learner.world_size, seed=0
        )
        rows.append(learner.train(payloads[learner.rank]))
    return rows


def make(rank: int, world_size: int, folder: Path, **settings: Any) -> Learner:
    """settings: of LearnerConfig, `algorithm`, those of AlgorithmConfig, and `chunk`, how many logits the head holds at once."""
    head.CHUNK_LOGITS["cpu"] = settings.pop("chunk", head.CHUNK_LOGITS["cpu"])
    algorithm = AlgorithmConfig.model_validate(settings.pop("algorithm", {}))
    config = LearnerConfig.model_validate(
        {"tokens_per_microbatch": 50, "warmup_steps": 3, **settings}
    )
    return Learner(algorithm, config, folder, rank=rank, world_size=world_size)


def job_train(
    rank: int,
    world_size: int,
    folder: Path,
    steps: tuple[int, int],
    settings: dict[str, Any],
    load: Path | None = None,
    save: Path | None = None,
) -> dict[str, Any]:
    """Train steps [first, last) after loading `load`; then save to `save`. critic: its whole state, where there is one."""
    learner = make(rank, world_size, folder, **settings)
    if load is not None:
        learner.load(load)
    loaded = learner.full_state()
    metrics = train(learner, range(*steps))
    if save is not None:
        learner.save(save)
    return {
        "loaded": loaded,
        "metrics": metrics,
        "state": learner.full_state(),
        "critic": [] if learner.critic is None else full_state(learner.critic.model),
        "version": learner.version,
    }


def job_roles(
    rank: int,
    world_size: int,
    folder: Path,
    steps: tuple[int, int],
    load: Path | None = None,
    save: Path | None = None,
) -> dict[str, Any]:
    """Steps of two roles with an adapter each. The second one is silent in the first step, and has a single row in the second, so that all
    ranks but one have none of it."""
    config = LearnerConfig.model_validate(
        {"lr": 5e-3, "tokens_per_microbatch": 50, "lora": {"rank": 3, "per_role": True}}
    )
    learner = Learner(
        ALGORITHM, config, folder, rank=rank, world_size=world_size, roles=["planner", "writer"]
    )
    if load is not None:
        learner.load(load)
    metrics = []
    for step in range(*steps):
        spans, batch = roles_batch({"planner": 1, "writer": 2}, step=step)
        alone = {1: [], 2: [batch.members[-1].rollout_id]}.get(step)
        if alone is not None:
            here = [
                row["role"] == "planner" or row["rollout_id"] in alone for row in spans.to_pylist()
            ]
            spans = spans.filter(here)
        payloads = lay_out(spans, batch, learner.algorithm, config, world_size=world_size, seed=0)
        metrics.append(learner.train(payloads[rank]))
    if save is not None:
        learner.save(save)
    return {"metrics": metrics, "state": learner.full_state()}


def job_branches(
    rank: int, world_size: int, folder: Path, rows: str, settings: dict[str, Any]
) -> dict[str, Any]:
    """Two steps on rollouts that branch, laid out as `trajectory.rows` says."""
    learner = make(rank, world_size, folder, **settings)
    trajectory = TrajectoryConfig.model_validate({"rows": rows})
    metrics = []
    for step in (1, 2):
        payloads = lay_out(
            *branching_batch(9, step=step), learner.algorithm, learner.config, world_size=world_size, seed=0, trajectory=trajectory
        )  # fmt: skip
        metrics.append(learner.train(payloads[rank]))
    return {"metrics": metrics, "state": learner.full_state()}


def job_one_row(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """A batch of a single row with signal: the second rank has nothing but an idle micro-batch."""
    learner = make(rank, world_size, folder)
    spans = table([call("a", [1, 2, 3], [4, 5], logprobs=[-3.9, -3.9])])
    there = Member(rollout_id="ro-1", attempt_id="at-1", reward=1.0)
    missing = Member(rollout_id="ro-2", attempt_id="at-2", reward=-9.0)
    batch = TrainBatch(step=1, groups=(GroupPlan(group_id="g", members=(there, missing)),))
    made = make_algorithm(ALGORITHM)
    config = LearnerConfig(tokens_per_microbatch=1)
    payloads = lay_out(spans, batch, made, config, world_size=world_size, seed=0)
    metrics = learner.train(payloads[rank])
    return {"metrics": [metrics], "state": learner.full_state()}


def job_die(rank: int, world_size: int, folder: Path, how: signal.Signals) -> str:
    """Rank 1 is killed or stopped after the first step; the other reports how its second one fails."""
    learner = make(rank, world_size, folder)
    train(learner, range(1, 2))
    if rank == 1:
        os.kill(os.getpid(), how)
    try:
        train(learner, range(2, 3))
    except RuntimeError as error:
        return f"failed: {error}"
    return "did not notice"


def job_die_in_save(rank: int, world_size: int, folder: Path, path: Path) -> None:
    """Killed when the tensors are written but the checkpoint is not complete."""
    from agl_ray.learner import checkpoint

    learner = make(rank, world_size, folder)
    train(learner, range(1, 2))
    save = checkpoint.dcp.save

    def save_and_die(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.dcp.save = save_and_die
    learner.save(path)


def job_export(
    rank: int, world_size: int, folder: Path, path: Path, settings: dict[str, Any] | None = None
) -> dict[str, Any]:
    learner = make(rank, world_size, folder, **(settings or {}))
    train(learner, range(1, 2))
    learner.export(path)
    return {"state": learner.full_state()}


def job_gradient(
    rank: int, world_size: int, folder: Path, settings: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """The gradient of the third step, before clipping, whole, by the parameter's name."""
    learner = make(rank, world_size, folder, max_grad_norm=1e9, **settings)
    train(learner, range(1, 3))
    found: dict[str, torch.Tensor] = {}

    def keep() -> None:
        for name, parameter in learner.model.named_parameters():
            if parameter.grad is not None:
                found[name] = fsdp.whole(parameter.grad).clone()

    learner.optimizer.step = keep  # type: ignore[method-assign]
    train(learner, range(3, 4))
    return found


def job_offload(
    rank: int, world_size: int, folder: Path, offload: bool
) -> list[tuple[str, torch.Tensor]]:
    """The weights after three updates of two micro-batches; on a CPU, so that nothing is copied, but by FSDP2's ways for offloaded weights."""
    model = load_model(folder)
    fsdp.shard(model, torch.float32, "cpu", offload)
    optimizer = optim.make_optimizer(model, LearnerConfig(lr=1e-2))
    ids = torch.arange(24).reshape(2, 12) + rank
    for _ in range(3):
        for row in ids:
            model(input_ids=row[None], labels=row[None]).loss.backward()
        optim.apply_gradients(model, optimizer, 1e-2, 1.0)
    assert fsdp.device_of(model).type == "cpu"
    return full_state(model, keep=rank == 0)


JOBS: dict[str, Callable[..., Any]] = {
    "train": job_train,
    "roles": job_roles,
    "branches": job_branches,
    "one_row": job_one_row,
    "die": job_die,
    "die_in_save": job_die_in_save,
    "export": job_export,
    "gradient": job_gradient,
    "offload": job_offload,
}
