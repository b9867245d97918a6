"""`agl-ray bench X`: measurements, each with --quick (under 45 s) and --json FILE (flat, documented keys)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from agl_ray.cli.verbs import Verbs

app = typer.Typer(
    cls=Verbs, help="Measure agl_ray on this machine.", no_args_is_help=True, rich_markup_mode=None
)

Quick = Annotated[bool, typer.Option("--quick", help="A small measurement, under 45 s.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers there too.")
]


@app.callback()
def _bench() -> None:
    """Measure agl_ray on this machine."""


@app.command()
def e2e(
    quick: Quick = False,
    json_file: JsonFile = None,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", min=1, max=64, help="With --quick: tokens of an answer (32)."),
    ] = None,
) -> None:
    """The whole loop against the ideal: what engine and learner reach alone, in the same run.

    \b
    Examples:
      agl-ray bench e2e --quick --json bench-e2e.json
      agl-ray bench e2e --quick --tokens 12    # short answers: the price of a call weighs more
    """
    from agl_ray.bench.e2e import QUICK_TOKENS, run_e2e

    if tokens is not None and not quick:
        raise typer.BadParameter(
            "expected with --quick only: the full measurement trains the quickstart's own agent",
            param_hint="--tokens",
        )
    report(run_e2e(quick=quick, tokens=tokens or QUICK_TOKENS), json_file)


@app.command()
def store(
    quick: Quick = False,
    json_file: JsonFile = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="LIBRARY",
            help="Measure `agentlightning` 0.3.0 too, installed by pip into an environment of its own (1 GB).",
        ),
    ] = None,
    cache: Annotated[
        Path, typer.Option("--cache", help="Folder of that environment and of the journals.")
    ] = Path(".cache"),
) -> None:
    """The store: flows in process, through its actor and over HTTP; spans, bytes, memory; does its past make it slow?

    \b
    Examples:
      agl-ray bench store --quick
      agl-ray bench store --against agentlightning --json bench-store.json    # 100,000 calls, a million rollouts
    """
    from agl_ray.bench.store import run_store
    from agl_ray.bench.store_show import show_store

    if against not in (None, "agentlightning"):
        raise typer.BadParameter(
            f"expected agentlightning, got {against!r}", param_hint="--against"
        )
    numbers = run_store(quick=quick, against=against, cache=cache)
    show_store(numbers)
    report(numbers, json_file, shown=False)


@app.command()
def gateway(
    quick: Quick = False,
    json_file: JsonFile = None,
    cache: Annotated[
        Path, typer.Option("--cache", help="Folder of the journal, on the disk that runs use.")
    ] = Path(".cache"),
) -> None:
    """The gateway: what it adds to a call, calls per second, memory; rollouts per minute; without --quick against a bare vLLM too.

    \b
    Examples:
      agl-ray bench gateway --quick
      agl-ray bench gateway --json bench-gateway.json    # 100,000 calls, and vllm serve
    """
    from agl_ray.bench.gateway import run_gateway

    report(run_gateway(quick=quick, cache=cache), json_file)


@app.command()
def trajectory(
    quick: Quick = False,
    json_file: JsonFile = None,
    alone: Annotated[
        bool,
        typer.Option(
            "--alone", help="Without agentlightning's adapter, which needs an installation."
        ),
    ] = False,
    cache: Annotated[
        Path, typer.Option("--cache", help="Folder of its environment (1 GB, made by pip once).")
    ] = Path(".cache"),
) -> None:
    """Spans to rows to train on, against agentlightning 0.3's triplet adapter: token ids per CPU second. And a training step
    with trajectory.rows: tree against the same step without.

    \b
    Examples:
      agl-ray bench trajectory --quick --json bench-trajectory.json
      agl-ray bench trajectory --alone
    """
    from agl_ray.bench.trajectory import run_trajectory

    report(run_trajectory(quick=quick, cache=cache, alone=alone), json_file)


@app.command()
def learner(
    quick: Quick = False,
    json_file: JsonFile = None,
    alone: Annotated[
        bool, typer.Option("--alone", help="Without TRL, which needs an installation.")
    ] = False,
    cache: Annotated[
        Path,
        typer.Option("--cache", help="Folder of TRL's environment (300 MB, made by pip once)."),
    ] = Path(".cache"),
) -> None:
    """A training step of the learner against TRL's GRPOTrainer: tokens per CPU second, peak memory; growth with rows and length.

    \b
    Examples:
      agl-ray bench learner --quick --json bench-learner.json
      agl-ray bench learner --alone
    """
    from agl_ray.bench.learner import run_learner

    report(run_learner(quick=quick, cache=cache, alone=alone), json_file)


def report(numbers: dict[str, Any], json_file: Path | None, *, shown: bool = True) -> None:
    """Print the numbers, one a line (`shown`), and write them to `json_file`."""
    wide = max(len(name) for name in numbers)
    for name, value in numbers.items() if shown else ():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        print(f"{name:<{wide}}  {text}")
    if json_file is not None:
        json_file.write_text(json.dumps(numbers, indent=2) + "\n")
        print(f"written to {json_file}")
