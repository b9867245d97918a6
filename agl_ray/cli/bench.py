"""`agl-ray bench X`: measurements, each with --quick (under 45 s) and --json FILE (flat, documented keys)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Measure agl_ray on this machine.", no_args_is_help=True, rich_markup_mode=None
)

Quick = Annotated[bool, typer.Option("--quick", help="A small measurement, under 45 s.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers there too.")
]


@app.callback()
def _bench() -> None:
    """Measure agl_ray on this machine."""


@app.command()
def e2e(quick: Quick = False, json_file: JsonFile = None) -> None:
    """The whole loop against the ideal: what engine and learner reach alone, in the same run.

    \b
    Example:
      agl-ray bench e2e --quick --json bench-e2e.json
    """
    from agl_ray.bench.e2e import run_e2e

    report(run_e2e(quick=quick), json_file)


def report(numbers: dict[str, Any], json_file: Path | None) -> None:
    """Print the numbers, one a line, and write them to `json_file`."""
    wide = max(len(name) for name in numbers)
    for name, value in numbers.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        print(f"{name:<{wide}}  {shown}")
    if json_file is not None:
        json_file.write_text(json.dumps(numbers, indent=2) + "\n")
        print(f"written to {json_file}")
