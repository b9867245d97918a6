"""From a YAML file and `a.b=c` overrides to a `RunConfig`, or to one paragraph that says what is wrong where.

Called by the command line and by `Trainer`. `load_config(path, overrides)` raises InputError for a file that cannot be
read and ConfigError for what it says. Test alone: tests/unit/test_config_load.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from agl_ray.config.explain import Sources, explain, unknown_key
from agl_ray.config.models import RunConfig
from agl_ray.config.paths import find, looked_in
from agl_ray.config.schema import field_at
from agl_ray.config.store_address import masked
from agl_ray.config.yaml_source import read, scalar
from agl_ray.types.errors import ConfigError, InputError


def load_config(path: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """The configuration in the YAML (or JSON) file `path`, changed by `overrides` such as `train.steps=80`.

    Raises InputError (no such file, not readable) or ConfigError (not YAML, unknown key, bad value, contradiction); both
    carry one paragraph that names file, line and key.
    """
    text, name = _read_text(Path(path))
    data, lines = read(text, name)
    if data is None:
        raise ConfigError(f"{name} is empty; a configuration needs at least `model:` and `data:`")
    if not isinstance(data, dict):
        raise ConfigError(
            f"{name}: expected keys with values at the top, got a {type(data).__name__}"
        )
    sources = Sources(name, lines)
    for override in overrides:
        _apply(data, override, sources)
    return validate(data, sources)


def validate(data: dict[str, Any], sources: Sources | None = None) -> RunConfig:
    """The RunConfig that plain data means; types are strict (a text is no number). ConfigError says what does not fit."""
    sources = sources or Sources("the configuration", {})
    try:
        # Through JSON, where strict validation still lets a list be a tuple and a text be a path.
        return RunConfig.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(explain(error, data, sources)) from None


def resolved_json(config: RunConfig) -> str:
    """The whole configuration as JSON, defaults and nulls included; `load_config` reads it back to an equal one. Only the password
    of `store.url` is left out (`agl_ray.config.store_address`)."""
    plain = config.model_dump(mode="json")
    if config.store.url is not None:
        plain["store"]["url"] = masked(config.store.url)
    return json.dumps(plain, indent=2) + "\n"


def _read_text(path: Path) -> tuple[str, str]:
    found = find(str(path), Path.cwd())
    if found is None:
        raise InputError(f"there is no configuration file {path}; {looked_in(str(path), Path())}")
    if found.is_dir():
        raise InputError(f"{path} is a folder; name the configuration file in it")
    try:
        return found.read_text(encoding="utf-8"), str(path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file in UTF-8: {error.reason}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _apply(data: dict[str, Any], override: str, sources: Sources) -> None:
    """Set the key of one `a.b=c` in `data`."""
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(
            f"{override!r} is no override: expected key=value, such as train.steps=80"
        )
    path = tuple(key.strip().split("."))
    if field_at(path) is None:
        raise ConfigError(unknown_key(path, f"override {override!r}"))
    section = data
    for number, part in enumerate(path[:-1]):
        inner = section.setdefault(part, {})
        if inner is None:
            inner = section[part] = {}
        if not isinstance(inner, dict):
            section_name = ".".join(path[: number + 1])
            raise ConfigError(
                f"override {override!r}: {section_name} is a section, but {sources.at(path[: number + 1])} "
                f"gives it the value {inner!r}"
            )
        section = inner
    section[path[-1]] = scalar(value)
    sources.override(path, override)
