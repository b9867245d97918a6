"""The writers that `logging.writers` names. Heavy packages are imported only when a writer opens.

`check_writers` is called by the trainer and `agl-ray check`, before anything starts; `make_writers` by the controller, with the keys that
`writer_keys` took from the driver's environment. Test alone: tests/unit/test_ops_writers.py.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agl_ray.config.logging import LoggingConfig
from agl_ray.ops.writer_mlflow import KEYS as MLFLOW_KEYS
from agl_ray.ops.writer_mlflow import MlflowWriter
from agl_ray.ops.writer_tensorboard import TensorBoardWriter
from agl_ray.ops.writer_wandb import KEYS as WANDB_KEYS
from agl_ray.ops.writer_wandb import WandbWriter, check_key
from agl_ray.ops.writers import Writer, hyperparameters
from agl_ray.types import ConfigError

EXTRAS = {"tensorboard": "learn", "wandb": "wandb", "mlflow": "mlflow"}
KEYS = (*WANDB_KEYS, *MLFLOW_KEYS)


def check_writers(config: LoggingConfig) -> None:
    """ConfigError names the extra of a package that is not installed, or the key that is missing."""
    for name in config.writers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"logging.writers: {name} needs the package {name}, which is not installed; install it with "
                f"pip install 'agl-ray[{EXTRAS[name]}]', or take {name} out of the list"
            )
    if "wandb" in config.writers:
        check_key(config.wandb)


def writer_keys(config: LoggingConfig) -> dict[str, str]:
    """What the writers need of this process's environment, for the process that runs them."""
    if not set(config.writers) - {"tensorboard"}:
        return {}
    return {name: os.environ[name] for name in KEYS if name in os.environ}


def make_writers(
    config: LoggingConfig, folder: Path, resolved: Mapping[str, Any], keys: Mapping[str, str]
) -> list[Writer]:
    """resolved: the configuration that is kept with the run, without secrets. keys: of `writer_keys`; put into this process's environment,
    where the libraries look for them."""
    os.environ.update(keys)
    flat = hyperparameters(resolved)
    made: dict[str, Writer] = {
        "tensorboard": TensorBoardWriter(folder, flat),
        "wandb": WandbWriter(folder, flat, config.wandb),
        "mlflow": MlflowWriter(folder, flat, config.mlflow),
    }
    return [made[name] for name in config.writers]
