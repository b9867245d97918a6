"""From the configuration to whoever is asked: a function of the user's or a model.

Who calls it: the judge actor; the trainer and `agl-ray check`, so that a function that is none is told before anything starts.
"""

from __future__ import annotations

from pathlib import Path

from agl_ray.config.imports import load_object
from agl_ray.config.judge import JudgeConfig
from agl_ray.judge.bench import Ask
from agl_ray.judge.endpoint import AskingModel
from agl_ray.judge.functions import asking_function


def asking(config: JudgeConfig, base: Path) -> Ask:
    """What asks one question; paths are resolved against `base`. InputError where the function is none, ConfigError where the key of the
    model is not in this process's environment."""
    if config.function is None:
        return AskingModel(config)
    return asking_function(load_object(config.function, base), config.function)


def check_function(config: JudgeConfig, base: Path) -> None:
    """InputError where `judge.function` names no function that can judge. (A model's key may be known only where the judges run.)"""
    if config.function is not None:
        asking(config, base)
