"""A store under load on a file system of a few MiB that fills up, and gets space again; ends with the check that nothing acknowledged is lost.

Run by tests/faults/test_store_disk.py as `python full_disk.py FOLDER` in a mount namespace of its own, where FOLDER is small.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
from pathlib import Path

from store_load import Load, Seen, check

from actors.store import RETRY_SECONDS, Store
from agl_ray.store import LightningStore
from agl_ray.store.doors.own_transport import OwnTransport
from agl_ray.store.journals.settings import JournalSettings
from agl_ray.types import StoreError

BALLAST = 12 * 2**20


async def load(store: LightningStore, name: str, seen: Seen, enough: float) -> StoreError | None:
    """Load until it fails (its error) or `enough` more spans are acknowledged: never by time, a fast disk would be full again."""
    running, most = Load(store, name, seen.note), len(seen.spans) + enough
    task = asyncio.create_task(running.run())
    give_up = time.monotonic() + 240.0
    while not task.done() and len(seen.spans) < most:
        assert time.monotonic() < give_up
        await asyncio.wait([task], timeout=0.01)
    running.stopping = True
    await asyncio.wait([task])
    error = task.exception()
    assert error is None or isinstance(error, StoreError), error
    return error if isinstance(error, StoreError) else None


async def main(folder: Path) -> None:
    url, seen = f"sqlite:///{folder}/store.db", Seen()
    ballast = folder / "ballast"
    ballast.write_bytes(bytes(BALLAST))
    core = Store(url, lease_seconds=600.0)
    store = LightningStore(OwnTransport(core.call), away_seconds=0.0)
    error = await load(store, "before", seen, math.inf)
    assert error is not None
    print(error)
    before = len(seen.spans)
    assert before > 0
    ballast.unlink()
    give_up = time.monotonic() + 60 * RETRY_SECONDS
    while time.monotonic() < give_up:
        try:
            await store.ping()  # it tries to open its file again
            break
        except StoreError:
            await asyncio.sleep(RETRY_SECONDS / 4)
    error = await load(store, "after", seen, 20)
    assert error is None, error
    await core.shutdown()
    counted = await check(url, JournalSettings(), seen)
    assert len(seen.spans) > before
    print(f"well: {counted}")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
