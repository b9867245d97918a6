"""`agl-ray train`: a run, or the rest of one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="CONFIG [a.b=c ...]", help="YAML file, then changes to its keys."),
]
Resume = Annotated[
    str | None,
    typer.Option(
        "--resume", metavar="RUN", help="Go on with this run: its folder, its name, or `latest`."
    ),
]


def train(words: Words = None, resume: Resume = None) -> None:
    """Train the agent that CONFIG names.

    \b
    Examples:
      agl-ray train configs/quickstart.yaml
      agl-ray train configs/quickstart.yaml seed=1 train.steps=80
      agl-ray train --resume latest

    Results are in runs/NAME-DATE-TIME (the newest one is runs/latest). With --resume and no CONFIG, the run's own configuration is
    taken; changes such as train.steps=80 still apply.
    """
    path, overrides, folder = split(words or [], resume)
    from agl_ray.config import load_config
    from agl_ray.ops.display import make_display
    from agl_ray.ops.log import setup_logging
    from agl_ray.ops.run_folder import base_of
    from agl_ray.trainer import Trainer

    config = load_config(path, overrides)
    setup_logging(None)
    newest = _newest(config.runs_dir)
    try:
        display = make_display(config_file=str(path))
        trainer = Trainer(config, config_folder=base_of(path), display=display)
        trainer.fit(resume=str(folder) if folder else None)
    except KeyboardInterrupt:
        run = folder or _newest(config.runs_dir)
        hint = f"; go on with: agl-ray train --resume {run}" if folder or run != newest else ""
        print(f"agl-ray: interrupted{hint}", file=sys.stderr)
        raise typer.Exit(1) from None


def split(words: list[str], resume: str | None) -> tuple[Path, list[str], Path | None]:
    """Configuration file, overrides and run folder, from what was typed."""
    from agl_ray.ops.run_folder import CONFIG, find_run

    folder = find_run(resume) if resume is not None else None
    named = bool(words) and ("=" not in words[0] or Path(words[0]).is_file())
    if not named and folder is None:
        raise typer.BadParameter(
            "name a configuration file first, such as configs/quickstart.yaml", param_hint="CONFIG"
        )
    if named:
        return Path(words[0]), words[1:], folder
    assert folder is not None
    return folder / CONFIG, words, folder


def _newest(runs_dir: Path) -> Path | None:
    link = runs_dir / "latest"
    return link.resolve() if link.is_symlink() else None
