"""How a journal is to keep a run's data: whose it is, where payloads go, whether it is encrypted, how connections are pooled.

Who calls it: the configuration and the command line make one, `agl_ray.store.journals.opening` reads it. Test alone:
tests/unit/test_store_journal_settings.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import msgspec

from agl_ray.types import ConfigError, Record

KEYS_VARIABLE = "AGL_ENCRYPTION_KEYS"
"""Environment variable of the encryption keys, comma separated, newest first. Keys are never part of the settings."""


class PoolSettings(Record, frozen=True):
    """Connections to a database server; a file needs none. Times in seconds.

    size: connections kept open. max_overflow: further ones under load. timeout: how long to wait for one. recycle: the age
    at which one is replaced; -1 = never. pre_ping: ask a connection whether it lives before using it.
    """

    size: int = 5
    max_overflow: int = 10
    timeout: float = 30.0
    recycle: float = 1800.0
    pre_ping: bool = True


class JournalSettings(Record, frozen=True):
    """run_id: part of every key, so that several runs share one database. payload: `journal`, or a URI of pyarrow.fs under which
    span payloads are files. encryption: of inputs, prompts, responses and resources at rest. mongodb_database: where a mongodb
    URL names none."""

    run_id: str = "default"
    payload: str = "journal"
    encryption: Literal["off", "aes-gcm", "fernet"] = "off"
    pool: PoolSettings = PoolSettings()
    mongodb_database: str = "agl_ray"

    @classmethod
    def from_environment(
        cls, environ: Mapping[str, str] | None = None, *, pool: Mapping[str, Any] = {}, **given: Any
    ) -> Self:
        """Settings as given; the pool and the Mongo database, where not given, from the environment.

        pool: the given fields of `PoolSettings` (None: not given). environ: None = the process's. ConfigError names the variable or field that
        cannot be read."""
        environ = os.environ if environ is None else environ
        pool = {name: value for name, value in pool.items() if value is not None}
        found = {
            name: _read(variable, environ[variable], read)
            for name, (variable, read) in _POOL_VARIABLES.items()
            if environ.get(variable)
        }
        if environ.get("MONGODB_DATABASE"):
            given = {"mongodb_database": environ["MONGODB_DATABASE"], **given}
        try:
            return msgspec.convert({**given, "pool": {**found, **pool}}, cls)
        except msgspec.ValidationError as error:
            raise ConfigError(f"store settings: {error}") from error


def _whole(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not (number >= 0 or number == -1):
        raise ValueError
    return number


def _flag(text: str) -> bool:
    return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[
        text.lower()
    ]


_EXPECTED: dict[Callable[[str], Any], str] = {
    _whole: "a whole number, 0 or more",
    _seconds: "a number of seconds",
    _flag: "true or false",
}
_POOL_VARIABLES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "size": ("DB_POOL_SIZE", _whole),
    "max_overflow": ("DB_MAX_OVERFLOW", _whole),
    "timeout": ("DB_POOL_TIMEOUT", _seconds),
    "recycle": ("DB_POOL_RECYCLE", _seconds),
    "pre_ping": ("DB_POOL_PRE_PING", _flag),
}


def _read(variable: str, text: str, read: Callable[[str], Any]) -> Any:
    try:
        return read(text.strip())
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"environment variable {variable}: expected {_EXPECTED[read]}, got {text!r}"
        ) from error
