"""`agl-ray sft`: supervised fine-tuning, of conversations or of a run's best rollouts (rejection sampling)."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from agl_ray.types import InputError

if TYPE_CHECKING:
    from agl_ray.config.lora import LoraConfig
    from agl_ray.learner.sft_run import SFTJob

Model = Annotated[
    Path,
    typer.Option(
        "--model", metavar="FOLDER", help="Hugging Face model folder, with its tokenizer."
    ),
]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="FILE|RUN",
        help=".jsonl or .parquet of conversations; or a run (folder, name, latest, store.db, URL).",
    ),
]
Output = Annotated[
    Path,
    typer.Option(
        "--output", metavar="FOLDER", help="New folder; the model comes into FOLDER/export."
    ),
]
MinReward = Annotated[
    float | None, typer.Option("--min-reward", help="Of a run: rollouts with at least this reward.")
]
Best = Annotated[
    int | None, typer.Option("--best", min=1, help="Of a run: the N best rollouts of each row.")
]
Epochs = Annotated[float, typer.Option("--epochs", min=0.0, help="Passes over the data.")]
Lr = Annotated[float, typer.Option("--lr", min=0.0, help="Peak learning rate (AdamW).")]
Schedule = Annotated[
    str,
    typer.Option(
        "--schedule", help="After the warm-up: linear, cosine (to 10 % of it) or constant."
    ),
]
Warmup = Annotated[
    float,
    typer.Option("--warmup", min=0.0, max=1.0, help="Share of the updates with a rising rate."),
]
BatchRows = Annotated[int, typer.Option("--batch-rows", min=1, help="Rows per update.")]
Tokens = Annotated[
    int,
    typer.Option(
        "--tokens-per-microbatch", min=2, help="Rows packed into one forward pass, in tokens."
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-row-tokens", min=2, help="Longest row (else the model's positions)."),
]
Overlong = Annotated[str, typer.Option("--overlong", help="A longer row: error, drop or truncate.")]
Val = Annotated[
    str | None, typer.Option("--val", metavar="FILE", help="Conversations to measure the loss on.")
]
ValShare = Annotated[
    float,
    typer.Option("--val-share", min=0.0, max=0.5, help="Or this share of the data, by --seed."),
]
ValEvery = Annotated[
    int,
    typer.Option("--val-every", min=0, help="Updates between measurements; 0 = before and after."),
]
LoraRank = Annotated[
    int | None,
    typer.Option(
        "--lora-rank", min=1, help="Train low-rank adapters of this rank, not all weights."
    ),
]
LoraAlpha = Annotated[
    int | None,
    typer.Option("--lora-alpha", min=1, help="Adapters act times alpha / rank (else alpha 32)."),
]
LoraTarget = Annotated[
    list[str] | None,
    typer.Option(
        "--lora-target",
        metavar="NAME",
        help="Last name of the linear layers with an adapter; several times (else all).",
    ),
]
AdapterOnly = Annotated[
    bool,
    typer.Option("--adapter-only", help="Export the adapter (peft) without the merged model."),
]
Weight = Annotated[float, typer.Option("--weight-decay", min=0.0, help="AdamW weight decay.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Of the forward pass: float32 or bfloat16.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, or auto.")]
Ranks = Annotated[int, typer.Option("--ranks", min=1, help="FSDP ranks on this machine.")]
Checkpointing = Annotated[
    bool,
    typer.Option(
        "--gradient-checkpointing", help="Less memory, about a third more time: same gradients."
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Order of the rows.")]
Every = Annotated[
    int, typer.Option("--checkpoint-every", min=0, help="Updates between checkpoints; 0 = none.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the fine-tuning in --output.")]
Writers = Annotated[
    list[str] | None,
    typer.Option(
        "--writer",
        metavar="NAME",
        help="tensorboard, wandb, mlflow; several times (else tensorboard).",
    ),
]


def sft(
    model: Model,
    data: Data,
    output: Output,
    min_reward: MinReward = None,
    best: Best = None,
    epochs: Epochs = 1.0,
    lr: Lr = 1e-5,
    schedule: Schedule = "cosine",
    warmup: Warmup = 0.03,
    batch_rows: BatchRows = 32,
    tokens_per_microbatch: Tokens = 4096,
    max_row_tokens: MaxTokens = None,
    overlong: Overlong = "error",
    val: Val = None,
    val_share: ValShare = 0.0,
    val_every: ValEvery = 0,
    lora_rank: LoraRank = None,
    lora_alpha: LoraAlpha = None,
    lora_target: LoraTarget = None,
    adapter_only: AdapterOnly = False,
    weight_decay: Weight = 0.01,
    dtype: Dtype = "float32",
    device: Device = "auto",
    ranks: Ranks = 1,
    gradient_checkpointing: Checkpointing = False,
    seed: Seed = 0,
    checkpoint_every: Every = 100,
    resume: Resume = False,
    writer: Writers = None,
) -> None:
    """Fine-tune --model on what assistants say in --data, and write it to --output.

    \b
    Examples:
      agl-ray sft --model qwen --data chats.jsonl --output tuned --epochs 2 --val-share 0.05
      agl-ray sft --model qwen --data latest --best 2 --min-reward 1 --output rejection-sampled
      agl-ray sft --model qwen --data chats.jsonl --output adapted --lora-rank 16 --lr 1e-4
      agl-ray train configs/quickstart.yaml model.make=null model.path=tuned/export

    A line of chats.jsonl: {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}], "tools": []}.
    Only assistants' turns are learned, their end included ("weight": 0 in one takes it out). Of a run, the exact tokens that its model
    sampled are learned; rollouts that failed, and held-out rows, are never taken. With --lora-rank the adapter is written to
    FOLDER/export/adapter beside the merged model; adapters want five to ten times the --lr.
    """
    given = dict(locals())
    from agl_ray.learner.sft_run import run

    job = make_job(given)
    show_data(job)
    try:
        summary = run(job)
    except KeyboardInterrupt:
        print("agl-ray: interrupted; go on with the same command and --resume")
        raise typer.Exit(1) from None
    show_summary(summary)


def make_job(given: dict[str, Any]) -> SFTJob:
    """The job that the options mean. InputError for options that contradict each other, and for bad data."""
    from agl_ray.cli.sft_data import load
    from agl_ray.config.logging import LoggingConfig
    from agl_ray.learner.model import check_model_folder
    from agl_ray.learner.sft import SFTConfig
    from agl_ray.learner.sft_run import SFTJob
    from agl_ray.ops.writer_choice import EXTRAS, check_writers

    _one_of("--schedule", given["schedule"], ("linear", "cosine", "constant"))
    _one_of("--overlong", given["overlong"], ("error", "drop", "truncate"))
    _one_of("--dtype", given["dtype"], ("float32", "bfloat16"))
    _one_of("--device", given["device"], ("auto", "cpu", "cuda"))
    for name in given["writer"] or []:
        _one_of("--writer", name, tuple(EXTRAS))
    if given["val"] and given["val_share"]:
        raise InputError("give --val or --val-share, not both")
    writers = LoggingConfig(writers=given["writer"] or ["tensorboard"])
    check_writers(writers)
    lora = _lora(given)
    device = _device(given["device"], given["ranks"])
    model = check_model_folder(given["model"])
    rows, held_out, facts = load(given, model)
    config = SFTConfig(
        steps=max(1, math.ceil(given["epochs"] * len(rows) / given["batch_rows"])),
        lr=given["lr"],
        batch_rows=given["batch_rows"],
        warmup_steps=0,
        schedule=given["schedule"],
        weight_decay=given["weight_decay"],
        tokens_per_microbatch=given["tokens_per_microbatch"],
        packed=True,
        seed=given["seed"],
    )
    config = replace(config, warmup_steps=math.ceil(given["warmup"] * config.steps))
    return SFTJob(
        model=model,
        output=given["output"],
        rows=rows,
        held_out=held_out,
        config=config,
        facts=facts,
        lora=lora,
        merged=not given["adapter_only"],
        ranks=given["ranks"],
        dtype=given["dtype"],
        device=device,
        gradient_checkpointing=given["gradient_checkpointing"],
        val_every=given["val_every"],
        checkpoint_every=given["checkpoint_every"],
        resume=given["resume"],
        writers=writers,
    )


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{option}: expected {', '.join(allowed)}, got {value!r}")


def _lora(given: dict[str, Any]) -> LoraConfig | None:
    from agl_ray.config.lora import LoraConfig

    if given["lora_rank"] is None:
        for name in ("lora_alpha", "lora_target", "adapter_only"):
            if given[name]:
                raise InputError(
                    f"--{name.replace('_', '-')} is of adapters, and without --lora-rank all weights are trained; give a rank, or leave it out"
                )
        return None
    chosen = {"alpha": given["lora_alpha"], "target_modules": given["lora_target"] or None}
    some = {name: value for name, value in chosen.items() if value is not None}
    return LoraConfig(rank=given["lora_rank"], **some)


def _device(asked: str, ranks: int) -> Literal["cpu", "cuda"]:
    """Where to train. InputError where there are fewer GPUs than ranks."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "cpu" or (asked == "auto" and gpus < ranks):
        return "cpu"
    if gpus < ranks:
        raise InputError(f"--device cuda: expected a GPU for each of {ranks} ranks, found {gpus}")
    return "cuda"


def show_data(job: SFTJob) -> None:
    """What will be learned from, before it begins."""
    facts, config = job.facts, job.config
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {number}" for key, number in value.items())
        print(f"{name.replace('_', ' '):<26} {value}")
    print(
        f"{'updates':<26} {config.steps} of {config.batch_rows} rows, {job.ranks} rank(s) on {job.device}, {job.dtype}",
        flush=True,
    )


def show_summary(summary: dict[str, Any]) -> None:
    """How it went, and where the model is."""
    held_out = summary["held_out_loss"]
    print(
        f"loss {summary['loss_first']:.4f} -> {summary['loss_last']:.4f} (mean of the last updates)"
    )
    if held_out:
        losses = [*held_out.values()]
        print(f"held-out loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    rate = summary["tokens_forward"] / summary["seconds_update"]
    print(
        f"{summary['tokens_trained']} tokens learned, {rate:.0f} tokens/s; loss curve in curves.png"
    )
    if summary["adapter"] is not None:
        print(f"adapter ({summary['parameters_trained']} parameters): {summary['adapter']}")
    if summary["export"] is not None:
        print(f"model: {summary['export']}")
