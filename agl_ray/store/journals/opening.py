"""Which journal a URL means, and what is wrapped around it.

What it is: `open_journal(url, settings)`. Drivers of databases are imported only where their URL is used.
Who calls it: `agl_ray.store.base`, the command line. Test alone: tests/unit/test_store_journal.py.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

from agl_ray.config.store_address import masked
from agl_ray.store.journals.base import Journal
from agl_ray.store.journals.memory import MemoryJournal
from agl_ray.store.journals.settings import KEYS_VARIABLE, JournalSettings
from agl_ray.store.journals.sqlite import SqliteJournal
from agl_ray.types import ConfigError

DATABASES = {"postgresql": "postgres", "postgresql+psycopg": "postgres"}
DATABASES |= {"mongodb": "mongo", "mongodb+srv": "mongo"}


def open_journal(
    url: str, settings: JournalSettings | None = None, *, keys: Sequence[str] | None = None
) -> Journal:
    """The journal for `url` (`sqlite:///path`: three slashes relative, four absolute; `postgresql://user:password@host:port/database`;
    `mongodb://...`; `memory://`), with payloads outside and encryption as `settings` say. Nothing is opened yet. keys: None = those of
    AGL_ENCRYPTION_KEYS.

    ConfigError: an unknown URL, a driver that is not installed, encryption without keys."""
    settings = settings or JournalSettings()
    journal = _bare(url, settings)
    if settings.payload != "journal":
        outside = _part("outside")
        journal = outside.Outside(journal, settings.payload)
    if settings.encryption != "off":
        encrypted = _part("encrypted")
        given = encryption_keys(settings.encryption) if keys is None else keys
        journal = encrypted.Encrypted(journal, settings.encryption, given)
    return journal


def open_reading(url: str, settings: JournalSettings | None = None) -> tuple[Journal, Any]:
    """(a journal that reads what is at `url` beside a living store of the run and changes nothing, the part of it that knows once it is open
    whether there is one: its `alive`). Where that is not possible (MongoDB): (`open_journal`, None). Nothing is opened yet; errors
    as in `open_journal`."""
    settings = settings or JournalSettings()
    scheme = url.partition("://")[0]
    if url.startswith("sqlite:///"):
        path = url.removeprefix("sqlite:///")
        inner = _part("sqlite_reading").SqliteReading(path)
    elif DATABASES.get(scheme) == "postgres":
        inner = _part("postgres_reading").PostgresReading(url, settings.run_id, settings.pool)
    else:
        return open_journal(url, settings), None
    journal: Journal = inner
    if settings.payload != "journal":
        journal = _part("outside").Outside(journal, settings.payload, reading=True)
    if settings.encryption != "off":
        keys = encryption_keys(settings.encryption)
        journal = _part("encrypted").Encrypted(journal, settings.encryption, keys, reading=True)
    return journal, inner


def _bare(url: str, settings: JournalSettings) -> Journal:
    scheme = url.partition("://")[0]
    if url == "memory://":
        return MemoryJournal()
    if scheme == "sqlite" and url.startswith("sqlite:///") and url != "sqlite:///":
        return SqliteJournal(url.removeprefix("sqlite:///"))
    database = DATABASES.get(scheme)
    if database == "postgres":
        journal: Journal = _part("postgres").PostgresJournal(url, settings.run_id, settings.pool)
        return journal
    if database == "mongo":
        made: Journal = _part("mongo").MongoJournal(
            url, settings.run_id, settings.pool, settings.mongodb_database
        )
        return made
    raise ConfigError(
        "store.url: expected sqlite:///path, postgresql://user:password@host:port/database, mongodb://host:port or memory://, "
        f"got {masked(url)!r}"
    )


def _part(name: str) -> Any:
    """A module of this package whose driver may be missing."""
    try:
        return importlib.import_module(f"agl_ray.store.journals.{name}")
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("agl_ray"):
            raise
        raise ConfigError(
            f"store.url: the {name} journal needs the package {error.name!r}: pip install 'agl-ray[stores]'"
        ) from error


def encryption_keys(encryption: str) -> tuple[str, ...]:
    """Newest first. ConfigError where there is none."""
    keys = tuple(key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip())
    if not keys:
        raise ConfigError(
            f"store.encryption is {encryption!r} and the environment variable {KEYS_VARIABLE} holds no key: set it, newest key "
            "first, comma separated"
        )
    return keys
