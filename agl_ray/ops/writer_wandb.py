"""Weights & Biases (extra `wandb`): one W&B run per run folder, gone on with when the run is resumed.

W&B's own files are in RUN_FOLDER/wandb; while the network is away it keeps what it could not send there. Steps are a metric of their own,
`step`, since W&B would silently drop what comes late for its built-in counter. Made by `agl_ray.ops.writer_choice`; test alone, with
wandb installed: tests/unit/test_ops_writers_outside.py.
"""

from __future__ import annotations

import netrc
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from agl_ray.config.logging import WandbConfig
from agl_ray.ops.writers import Place
from agl_ray.types import ConfigError

KEY = "WANDB_API_KEY"
KEYS = (KEY, "WANDB_BASE_URL")
SERVER = "https://api.wandb.ai"


def check_key(config: WandbConfig) -> None:
    """ConfigError where W&B is to be reached and neither WANDB_API_KEY nor `wandb login` gives a key."""
    if config.mode == "offline" or os.environ.get(KEY):
        return
    host = urlsplit(os.environ.get("WANDB_BASE_URL", SERVER)).hostname or ""
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        known = None
    if known is None:
        raise ConfigError(
            f"logging.writers: wandb needs a key for {host}, expected {KEY} in the environment or `wandb login`, got neither; set it, or "
            "write files only: logging.wandb.mode=offline"
        )


class WandbWriter:
    """Points under their grouped names; the configuration as the run's config."""

    name = "wandb"

    def __init__(self, folder: Path, config: Mapping[str, Any], settings: WandbConfig) -> None:
        self._folder, self._config, self._settings = folder, config, settings
        self._run: Any = None

    def open(self, place: Place) -> Place:
        import wandb

        settings = self._settings
        place.run = place.run or secrets.token_hex(8)
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            group=settings.group,
            mode=settings.mode,
            id=place.run,
            name=self._folder.name,
            resume="allow",
            dir=str(self._folder),
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, reinit="create_new"
            ),
        )
        self._run.config.update(dict(self._config), allow_val_change=True)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        return place

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self, ok: bool) -> None:
        self._run.finish(exit_code=0 if ok else 1)
