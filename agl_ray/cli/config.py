"""`agl-ray config`: the resolved configuration."""

from __future__ import annotations

from typing import Annotated

import typer

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="Changes to its keys.")
]


def show(config: Config, overrides: Overrides = None) -> None:
    """Print the whole configuration as JSON: the file, the changes, and every default.

    \b
    Example:
      agl-ray config configs/quickstart.yaml learner.lr=1e-4
    """
    from agl_ray.config import load_config, resolved_json

    print(resolved_json(load_config(config, overrides or [])), end="")
