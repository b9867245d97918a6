"""A fine-tuning from rows to a model folder, on one rank in this process or on several in processes of their own.

    output/  export/ (the model, Hugging Face format; of adapters the merged one, and export/adapter for peft), metrics.jsonl, validation.jsonl, summary.json, curves.png, checkpoints/, tensorboard/, sft.json

`run(job)` is called by `agl-ray sft`. Every rank has all rows and takes its share of each batch; rank 0 shows and writes. A sitting that
ended early is gone on with from its newest checkpoint (`job.resume`), and gives the weights that an undisturbed one would have given.
Test it alone: tests/unit/test_learner_sft_run.py, tests/integration/test_sft_ranks.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from agl_ray.config.logging import LoggingConfig
from agl_ray.config.lora import LoraConfig
from agl_ray.learner.sft import SFTConfig, SFTResult, SFTStep, Tuner
from agl_ray.ops.display import Display, make_display
from agl_ray.ops.events import Notice, Phase, Progress
from agl_ray.ops.writer_choice import make_writers
from agl_ray.ops.writers import MetricsBoard
from agl_ray.trajectory.ragged import Rows
from agl_ray.types import InputError, RunError

SETTINGS = "sft.json"
SUMMARY = "summary.json"
EXPORT = "export"
JOIN_SECONDS = 600.0  # a collective of the ranks
WRITER_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class SFTJob:
    """What to do. model: a Hugging Face folder. rows, held_out: to train on, and to measure the loss on (None: not measured). facts: what
    the summary says of the data. lora: train adapters, None: all weights. merged: with adapters, export the merged model too.
    gradient_checkpointing: as the learner's (learner/recompute.py); it changes no weight, so that a resumed job may have it or not.
    rows_sha256: of the rows, made from them once. val_every, checkpoint_every: in updates; 0 = only at the end."""

    model: Path
    output: Path
    rows: Rows
    held_out: Rows | None
    config: SFTConfig
    facts: Mapping[str, Any]
    lora: LoraConfig | None = None
    merged: bool = True
    ranks: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    gradient_checkpointing: bool = False
    val_every: int = 0
    checkpoint_every: int = 100
    resume: bool = False
    writers: LoggingConfig = field(default_factory=LoggingConfig)
    rows_sha256: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows_sha256", _sha256(self.rows))

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides which weights come out, the data by their size and digest; of a resumed job it must be the same."""
        rows = {
            "rows": len(self.rows),
            "tokens": int(self.rows.lengths.sum()),
            "rows_sha256": self.rows_sha256,
        }
        told = {"model": str(self.model.resolve()), **asdict(self.config), "dtype": self.dtype}
        lora = None if self.lora is None else self.lora.model_dump()
        plain: dict[str, Any] = json.loads(json.dumps({**told, **rows, "lora": lora}))
        return plain

    @property
    def checkpoints(self) -> Path:
        return self.output / "checkpoints"

    @property
    def exported(self) -> dict[str, str | None]:
        """Where model and adapter come; None for one that is not made."""
        from agl_ray.learner.export import ADAPTER_FOLDER

        model = self.output / EXPORT
        return {
            "export": str(model) if self.merged else None,
            "adapter": None if self.lora is None else str(model / ADAPTER_FOLDER),
        }


def _sha256(rows: Rows) -> str:
    """Of ids, lengths and weights in their order; the same on every machine."""
    digest = hashlib.sha256()
    for array, form in ((rows.ids, "<i4"), (rows.lengths, "<i8"), (rows.weights, "<f4")):
        digest.update(np.ascontiguousarray(array, form).data)
    return digest.hexdigest()


def run(job: SFTJob) -> dict[str, Any]:
    """Do it; returns the summary (also summary.json). InputError where the output folder is in use or another job's, RunError where the
    training fails."""
    _claim(job)
    if job.ranks == 1:
        run_rank(0, job, 0)
    else:
        _run_ranks(job)
    summary: dict[str, Any] = json.loads((job.output / SUMMARY).read_text())
    return summary


def _run_ranks(job: SFTJob) -> None:
    """Each rank in a process of its own; the first that fails ends the others."""
    from torch.multiprocessing import start_processes
    from torch.multiprocessing.spawn import ProcessException

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        # Daemons end with this process.
        start_processes(own_process, (job, port), job.ranks, daemon=True, start_method="spawn")
    except ProcessException as error:
        cause = str(error).strip().splitlines()[-1]
        raise RunError(
            f"rank {error.error_index} of {job.ranks} of the fine-tuning failed: {cause}; --resume goes on from its newest checkpoint"
        ) from error


def _claim(job: SFTJob) -> None:
    """Make the output folder, or see that it holds the same job."""
    path = job.output / SETTINGS
    if not job.resume:
        if job.output.exists() and (not job.output.is_dir() or any(job.output.iterdir())):
            raise InputError(
                f"--output {job.output}: expected a new or an empty folder, got one with something in it; give another, or go on with "
                "the fine-tuning in it: --resume"
            )
        job.output.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(job.settings, indent=2) + "\n")
        return
    if not path.is_file():
        raise InputError(
            f"--resume: there is no {SETTINGS} in {job.output}, so no fine-tuning to go on with"
        )
    if (job.output / SUMMARY).is_file():
        raise InputError(
            f"--resume: the fine-tuning in {job.output} is finished, its model is in {EXPORT}/"
        )
    before = json.loads(path.read_text())
    for key, value in job.settings.items():
        if key not in before:
            raise InputError(
                f"--resume: expected {key} in {path}, found none: another version of agl-ray began this fine-tuning, and whether the settings and data are "
                "still the same cannot be seen; finish it with that version, or begin anew in another --output"
            )
        if before[key] != value:
            raise InputError(
                f"--resume: {key} was {before[key]!r} and is {value!r} now; a fine-tuning goes on with the settings and data that it "
                "was begun with"
            )


def own_process(rank: int, job: SFTJob, port: int) -> None:
    """One rank's whole work in a process of its own, which ends here.

    Past the interpreter's shutdown: a thread of Gloo may still hold tensors then, and the release of one after the interpreter is gone aborts the
    process (torch 2.13; about one time in fifty on a busy machine), which would make a failure of a fine-tuning that is done.
    """
    run_rank(rank, job, port)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_rank(rank: int, job: SFTJob, port: int) -> None:
    """One rank's whole work."""
    import torch

    from agl_ray.learner import fsdp
    from agl_ray.learner.lora import add_adapters
    from agl_ray.learner.model import load_model
    from agl_ray.learner.recompute import recompute_layers

    device = job.device
    if job.ranks > 1:
        if device == "cuda":
            torch.cuda.set_device(rank)
        fsdp.join_group(rank, job.ranks, "127.0.0.1", port, device, JOIN_SECONDS)
    torch.manual_seed(job.config.seed + rank)
    display: Any = make_display() if rank == 0 else nullcontext()
    with display:
        model = load_model(job.model, device)
        if job.lora is not None:
            add_adapters(model, job.lora, job.config.seed)
        if job.gradient_checkpointing:
            recompute_layers(model)
        tuner = Tuner(model, job.config, rank=rank, world_size=job.ranks, dtype=job.dtype)
        work = _Sitting(job, tuner, display if rank == 0 else None)
        result = work.train()
        _export(job, model, rank)
        fsdp.barrier()
        work.finish(result)
    fsdp.leave_group()


def _export(job: SFTJob, model: Any, rank: int) -> None:
    from agl_ray.learner.export import export, export_adapter

    target, first = job.output / EXPORT, rank == 0
    if job.merged:
        export(model, job.model, target, write=first)
    else:
        export_adapter(model, target, write=first)


class _Sitting:
    """The training of one rank with what surrounds it: checkpoints and held-out losses on all ranks, screen and files on rank 0."""

    def __init__(self, job: SFTJob, tuner: Tuner, display: Display | None) -> None:
        self.job, self.tuner, self.display = job, tuner, display
        self._board: MetricsBoard | None = None

    def train(self) -> SFTResult:
        newest = max(self.job.checkpoints.glob("step-*"), default=None)
        if newest is not None:
            self.tuner.load(newest)
        if self.display is not None:
            settings = {**self.job.settings, **self.job.facts}
            writers = make_writers(self.job.writers, self.job.output, settings, {})
            self._board = MetricsBoard(self.job.output, writers, self._tell)
            self._board.begin(self.tuner.step)
            self.display.show(Phase(name="fine-tuning", state="start"))
        if self.tuner.step == 0:
            self._measure()
        ended_well = False
        try:
            result = self.tuner.fit(self.job.rows, self._after)
            ended_well = True
        finally:
            if self._board is not None:
                self._board.close(ended_well, WRITER_SECONDS if ended_well else 2.0)
        return result

    def _tell(self, text: str) -> None:
        if self.display is not None:
            self.display.show(Notice(text=text))

    def _after(self, done: SFTStep) -> None:
        """What follows an update."""
        job, last = self.job, done.step == self.job.config.steps
        if self._board is not None:
            self._board.write(self._row(done))
            self._show(done)
        if last or (job.val_every and done.step % job.val_every == 0):
            self._measure()
        if job.checkpoint_every and not last and done.step % job.checkpoint_every == 0:
            self.tuner.save(job.checkpoints / f"step-{done.step:06d}")
            if self.display is not None:
                for old in sorted(job.checkpoints.glob("step-*"))[:-1]:
                    shutil.rmtree(old)

    def _row(self, done: SFTStep) -> dict[str, Any]:
        return {
            "step": done.step,
            "loss": done.loss,
            "grad_norm": done.grad_norm,
            "lr": done.lr,
            "epoch": done.step * self.job.config.batch_rows / len(self.job.rows),
            "tokens_trained": done.num_predicted,
            "tokens_forward": done.num_tokens,
            "tokens_per_second": done.num_tokens / done.seconds,
            "seconds_update": done.seconds,
        }

    def _show(self, done: SFTStep) -> None:
        if self.display is not None:
            detail = f"loss {done.loss:.4f}, {done.num_tokens / done.seconds:.0f} tokens/s"
            steps = self.job.config.steps
            self.display.show(Progress(name="updates", done=done.step, total=steps, detail=detail))

    def _measure(self) -> None:
        """The loss on the held-out rows, where there are some."""
        if self.job.held_out is None:
            return
        loss, step = self.tuner.loss_of(self.job.held_out), self.tuner.step
        if self._board is not None:
            rows = len(self.job.held_out)
            self._board.validated({"step": step, "loss": loss, "rows": rows})
            self._tell(f"held-out loss after step {step}: {loss:.4f} ({rows} rows)")

    def finish(self, result: SFTResult) -> None:
        """Summary and curve, on rank 0; the checkpoints have done their work."""
        if self.display is None:
            return
        from agl_ray.ops.curves import draw_losses
        from agl_ray.ops.metrics import VALIDATION_FILE, read_metrics

        output = self.job.output
        rows = read_metrics(output)
        summary = {
            "model": str(self.job.model),
            **self.job.exported,
            "parameters_trained": self.tuner.num_trained,
            **self.job.facts,
            "steps": result.steps,
            "epochs": rows[-1]["epoch"],
            "tokens_trained": sum(row["tokens_trained"] for row in rows),
            "tokens_forward": sum(row["tokens_forward"] for row in rows),
            "seconds_update": sum(row["seconds_update"] for row in rows),
            "ranks": self.job.ranks,
            "loss_first": rows[0]["loss"],
            "loss_last": sum(row["loss"] for row in rows[-10:]) / len(rows[-10:]),
            "held_out_loss": {
                str(row["step"]): row["loss"] for row in read_metrics(output, VALIDATION_FILE)
            },
            "loss": [row["loss"] for row in rows],
        }
        (output / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
        draw_losses(output)
        shutil.rmtree(self.job.checkpoints, ignore_errors=True)
        self.display.show(Phase(name="fine-tuning", state="end", seconds=summary["seconds_update"]))
