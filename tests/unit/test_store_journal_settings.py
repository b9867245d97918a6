"""Settings of a journal: what is given wins, the environment fills in, a bad variable is named."""

from __future__ import annotations

import pytest

from agl_ray.store.journals.settings import JournalSettings, PoolSettings
from agl_ray.types import ConfigError


def test_defaults_and_what_the_environment_fills_in() -> None:
    assert JournalSettings.from_environment({}) == JournalSettings()
    environ = {
        "DB_POOL_SIZE": "7",
        "DB_MAX_OVERFLOW": "0",
        "DB_POOL_TIMEOUT": "2.5",
        "DB_POOL_RECYCLE": "-1",
        "DB_POOL_PRE_PING": "False",
        "MONGODB_DATABASE": "mine",
    }
    settings = JournalSettings.from_environment(environ, run_id="r", encryption="fernet")
    pool = PoolSettings(size=7, max_overflow=0, timeout=2.5, recycle=-1, pre_ping=False)
    assert settings == JournalSettings(
        run_id="r", encryption="fernet", pool=pool, mongodb_database="mine"
    )


def test_what_is_given_wins() -> None:
    environ = {"DB_POOL_SIZE": "7", "DB_POOL_TIMEOUT": "9", "MONGODB_DATABASE": "mine"}
    settings = JournalSettings.from_environment(
        environ, pool={"size": 2}, mongodb_database="theirs"
    )
    assert (settings.pool.size, settings.pool.timeout) == (2, 9.0)
    assert settings.mongodb_database == "theirs"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DB_POOL_SIZE", "many"),
        ("DB_MAX_OVERFLOW", "-3"),
        ("DB_POOL_TIMEOUT", "nan"),
        ("DB_POOL_RECYCLE", "soon"),
        ("DB_POOL_PRE_PING", "perhaps"),
    ],
)
def test_a_bad_variable_is_named(variable: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{variable}: expected .*got '{value}'"):
        JournalSettings.from_environment({variable: value})


def test_a_bad_field_is_named() -> None:
    with pytest.raises(ConfigError, match="encryption"):
        JournalSettings.from_environment({}, encryption="rot13")
    with pytest.raises(ConfigError, match=r"pool\.size"):
        JournalSettings.from_environment({}, pool={"size": "x"})
