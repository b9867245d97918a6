"""`agl-ray store rotate`: an encrypted store is sealed with the newest key, so that older ones can be taken away.

What it is: a store that opens seals its data keys with the newest of the given keys (`agl_ray.store.journals.encrypted`). Here that is all that is
done, and then proved: the store is opened again with the newest key alone. A SQLite file is written anew, so that what the old key
had sealed is not left in its free space. Broken off at any place, it is done by doing it again.
Called by `agl_ray.cli.store`. Test alone: tests/unit/test_cli_store_rotate.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from agl_ray.cli.store_clear import shrink
from agl_ray.cli.store_target import Target
from agl_ray.store.journals.marks import open_checked
from agl_ray.store.journals.opening import encryption_keys, open_journal
from agl_ray.types import InputError, StoreError


async def rotate(target: Target) -> None:
    """InputError: a store that is not encrypted, is alive, or is not opened by the given keys."""
    if target.door:
        raise InputError(
            f"store rotate {target.shown}: name the run folder or URL of its journal; a running store has its keys"
        )
    if target.settings.encryption == "off":
        raise InputError(
            f"store rotate {target.shown}: by its configuration it is not encrypted; for a URL, say --encryption aes-gcm or "
            "fernet as it was written"
        )
    if target.alive:
        raise InputError(f"{target.shown}: its run is alive and owns it; end the run first")
    keys = encryption_keys(target.settings.encryption)
    await _open(target, keys)
    await _open(target, keys[:1])
    if target.file is not None:
        shrink(target.file)


async def _open(target: Target, keys: Sequence[str]) -> None:
    journal = open_journal(target.url, target.settings, keys=keys)
    try:
        await open_checked(journal, must_exist=True)
    except StoreError as error:
        raise InputError(str(error)) from error
    await journal.close()
