"""Where a run's store is: the URL that its configuration gives, with the password kept out of what is written down.

A run folder's config.json has the URL with `***` for the password; whoever opens the store again (`--resume`, `agl-ray store`) gets it
from DATABASE_URL. Called by the trainer and the verbs of `agl-ray store`. Test alone: tests/unit/test_config_store_address.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from agl_ray.types import ConfigError

VARIABLE = "DATABASE_URL"
MASK = "***"


def store_url(given: str | None, folder: Path, environ: Mapping[str, str] | None = None) -> str:
    """The URL to open: `given` (its password from DATABASE_URL where it is masked), else DATABASE_URL, else store.db in `folder`.

    ConfigError where the password was masked and DATABASE_URL does not name the same server, database and user."""
    environ = os.environ if environ is None else environ
    variable = environ.get(VARIABLE) or None
    if given is None:
        return variable or f"sqlite:///{folder / 'store.db'}"
    if not _is_masked(given):
        return given
    if variable is None or masked(variable) != given:
        has = "is not set" if variable is None else f"is {masked(variable)}"
        raise ConfigError(
            f"store.url: {given}: its password was not written down; set {VARIABLE} to the same URL with the password (it {has}), or "
            "give store.url=..."
        )
    return variable


def masked(url: str) -> str:
    """The URL with `***` in place of a password; a URL without one, or that cannot be read as one, as it is."""
    try:
        parts = urlsplit(url)
        password = parts.password
    except ValueError:
        return url
    if password is None:
        return url
    name, _, place = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{name.partition(':')[0]}:{MASK}@{place}"))


def without_keys(uri: str) -> str:
    """`uri` of files, if no secret is in it; ConfigError otherwise: it would stand in config.json and in messages."""
    if masked(uri) != uri:
        raise ConfigError(
            f"store.payload: expected a URI without a secret key in it, got {masked(uri)}; give the key to every node by environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS) or by the machine's role"
        )
    return uri


def _is_masked(url: str) -> bool:
    return f":{MASK}@" in url
