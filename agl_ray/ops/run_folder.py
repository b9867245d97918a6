"""Run folders: `runs/<name>-<date>-<time>[-n]`, and `runs/latest`, which links to the newest.

Made by the trainer; found by `agl-ray train --resume RUN`. Test alone: tests/unit/test_ops_run_folder.py.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from pathlib import Path

import msgspec

from agl_ray.config import RunConfig, resolved_json
from agl_ray.config.paths import close_names
from agl_ray.types import InputError

LATEST = "latest"
CONFIG = "config.json"
ORIGIN = "origin.json"


def make_run_folder(config: RunConfig, base: Path | None = None) -> Path:
    """Make a new folder for a run of `config`, with its config.json, and point `latest` at it.

    base: the folder that the configuration's relative paths are looked up in besides the current directory; kept in
    origin.json, for resuming. Absolute path returned. InputError when `runs_dir` cannot be written.
    """
    runs = config.runs_dir.expanduser().absolute()
    stem = f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        runs.mkdir(parents=True, exist_ok=True)
        folder = _fresh(runs, stem)
        (folder / CONFIG).write_text(resolved_json(config))
        origin = {"base": str((base or Path.cwd()).resolve()), "cwd": str(Path.cwd())}
        (folder / ORIGIN).write_bytes(msgspec.json.encode(origin) + b"\n")
        link_latest(folder)
    except OSError as error:
        raise InputError(
            f"runs_dir {runs}: no run folder can be made there ({error.strerror or error}); "
            "give another one: runs_dir=PATH"
        ) from error
    return folder


def _fresh(runs: Path, stem: str) -> Path:
    """A folder that was not there before; `-2`, `-3` ... where the second has been used already."""
    number = 1
    while True:
        folder = runs / (stem if number == 1 else f"{stem}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
        number += 1


def link_latest(folder: Path) -> None:
    """Point `latest` beside `folder` at it, in one step: a reader sees the old or the new one, never none."""
    link = folder.parent / LATEST
    fresh = folder.parent / f".{LATEST}-{secrets.token_hex(4)}"
    fresh.symlink_to(folder.name)
    os.replace(fresh, link)


def find_run(name: str, runs_dir: Path = Path("runs")) -> Path:
    """The folder of the run `name`: a path, or a name in `runs_dir` (`latest` too). InputError when there is none."""
    for path in (Path(name).expanduser(), runs_dir / name):
        if (path / CONFIG).is_file():
            return path.resolve()
    names = [each.name for each in runs_dir.iterdir()] if runs_dir.is_dir() else []
    hint = close_names(name, names)
    raise InputError(
        f"there is no run {name}: expected a run folder with a {CONFIG} in it, or the name of one in {runs_dir}/{hint}"
    )


def base_of(config_file: Path) -> Path:
    """Where the relative paths of a configuration file are looked up besides the current directory: its folder, or for
    the config.json of a run what that run was started with."""
    folder = config_file.resolve().parent
    origin = folder / ORIGIN
    if config_file.name != CONFIG or not origin.is_file():
        return folder
    return Path(msgspec.json.decode(origin.read_bytes())["base"])
