"""Keys of endpoints: a configuration names an environment variable, never a key. Called by roles.py, teacher.py and agl_ray/judge. Test alone:
tests/unit/test_config_teacher.py."""

from __future__ import annotations

import os

from agl_ray.types.errors import ConfigError


def endpoint_key(
    field: str, variable: str | None, url: str | None, where: str = "where the run is started"
) -> str | None:
    """The key of the endpoint `url`, out of this process's environment; None where `field` names no variable; ConfigError where it names one
    that holds nothing."""
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise ConfigError(
            f"{field}: expected the environment variable {variable} to hold the key of {url}, got nothing; set it {where}"
        )
    return key
