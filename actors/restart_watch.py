"""RestartWatch: hears of processes that were started again without the controller's doing: engines, weight sync, gateways, the store.

A helper inside the controller, which asks it once per step. (Runners and learner ranks are replaced by the controller itself.)
Test alone: tests/faults/test_run_kills.py (real processes).
"""

from __future__ import annotations

from ray.actor import ActorHandle

from actors.gateway import GATEWAYS
from actors.run_events import RunEvents
from agl_ray.ops.events import Notice
from agl_ray.store import LightningStore
from agl_ray.waits import wait


class RestartWatch:
    def __init__(self, store: LightningStore, sync: ActorHandle, said: RunEvents) -> None:
        self._store, self._sync, self._said = store, sync, said
        self._gateways: set[str] = set()
        self._store_restarts = 0

    async def begin(self) -> None:
        """Take what there is as the beginning: an engine that came late, earlier sittings of the run."""
        await self._news_of_sync()
        self._gateways = await self._known_gateways()
        self._store_restarts = await self._known_restarts()

    async def hear(self) -> None:
        """Tell what was replaced since the last call."""
        for notice in await self._news_of_sync():
            await self._said.tell(notice)
        gateways = await self._known_gateways()
        for name in sorted(gateways - self._gateways):
            text = f"gateway {name.removeprefix(GATEWAYS)} was started in place of a lost one; it rebuilds conversations from the store"
            await self._said.notice(text, "gateway")
        restarts = await self._known_restarts()
        for _ in range(restarts - self._store_restarts):
            text = "the store died and was restored from its journal; nothing acknowledged was lost"
            await self._said.notice(text, "store")
        self._gateways, self._store_restarts = gateways, restarts

    async def _news_of_sync(self) -> list[Notice]:
        return list(await wait(self._sync.take_news.remote(), on="news of weight sync", seconds=60))

    async def _known_gateways(self) -> set[str]:
        return set(await self._store.list_state(GATEWAYS))

    async def _known_restarts(self) -> int:
        return int((await self._store.statistics())["restarts"])
