"""Which store a person means: RUN as a run folder, a run's name, `latest`, a store.db, a URL, or the address of a running store's door.

Called by the verbs of `agl_ray.cli.store`. Test alone: tests/unit/test_cli_store.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from agl_ray.config.store_address import masked, store_url
from agl_ray.types import InputError, StoreError, WaitTimeout

if TYPE_CHECKING:
    from agl_ray.store.archive import Archive
    from agl_ray.store.journals.settings import JournalSettings

SQLITE = "sqlite:///"
DOORS = ("http://", "https://")
KEY_VARIABLE = "AGL_STORE_API_KEY"


class Target(NamedTuple):
    """A store: its URL, and how its journal keeps data."""

    url: str
    settings: JournalSettings

    @property
    def shown(self) -> str:
        """The URL without its password."""
        return masked(self.url)

    @property
    def file(self) -> Path | None:
        """The SQLite file, where it is one."""
        return Path(self.url.removeprefix(SQLITE)) if self.url.startswith(SQLITE) else None

    @property
    def alive(self) -> bool:
        """Whether a process owns the SQLite file."""
        from agl_ray.store.journals.sqlite_reading import is_owned

        return self.file is not None and is_owned(self.file)

    @property
    def door(self) -> bool:
        """Whether it is the address of a running store."""
        return self.url.startswith(DOORS)


def target_of(
    run: str,
    *,
    run_id: str | None = None,
    payload: str | None = None,
    encryption: str | None = None,
) -> Target:
    """The store that `run` names. The run's own configuration says how its journal keeps data, the options say it where there is none.

    InputError: no such run, no store in it, settings that make no sense."""
    url, section = _url_and_section(run)
    given = {"run_id": run_id, "payload": payload, "encryption": encryption}
    given = {name: value for name, value in given.items() if value is not None}
    if given and url.startswith(DOORS):
        name = "--" + next(iter(given)).replace("_", "-")
        raise InputError(f"{name}: {url} is the door of a running store, which knows that itself")
    return Target(url, settings_of(**{**section, **given}))


def settings_of(**section: Any) -> JournalSettings:
    """How a journal keeps its data, from fields of a `store:` section (others in it, and None, are passed over) and the environment."""
    from agl_ray.store.journals.settings import JournalSettings

    names = ("run_id", "payload", "encryption", "mongodb_database")
    fields = {name: section[name] for name in names if section.get(name) is not None}
    return JournalSettings.from_environment(pool=section.get("pool") or {}, **fields)


def _url_and_section(run: str) -> tuple[str, dict[str, Any]]:
    from agl_ray.ops.run_folder import CONFIG, find_run

    if "://" in run:
        return run, {}
    path = Path(run).expanduser()
    if path.is_file():
        return f"{SQLITE}{path.absolute()}", {}
    if path.suffix == ".db":
        raise InputError(f"there is no store file {run}")
    folder = find_run(run)
    try:
        section = json.loads((folder / CONFIG).read_text()).get("store") or {}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"run {folder}: its {CONFIG} cannot be read: {error}") from error
    section["run_id"] = section.get("run_id") or folder.name
    url = section.get("url")
    if url is not None:
        url = store_url(url, folder)
    if url is None and not (folder / "store.db").is_file():
        raise InputError(f"run {folder}: there is no store.db in it; has it begun?")
    return url or f"{SQLITE}{folder / 'store.db'}", section


@asynccontextmanager
async def opened(target: Target) -> AsyncIterator[Archive]:
    """The target for reading. What is wrong with it at the beginning is wrong input. A door that asks for a key is shown AGL_STORE_API_KEY."""
    from agl_ray.store.archive import open_archive

    key = os.environ.get(KEY_VARIABLE) or None
    opening = open_archive(target.url, target.settings, api_key=key)
    try:
        archive = await opening.__aenter__()
    except StoreError as error:
        raise InputError(str(error)) from error
    except WaitTimeout as error:
        raise InputError(f"{target.shown}: no store answers there ({error})") from error
    try:
        yield archive
    finally:
        await opening.__aexit__(None, None, None)
