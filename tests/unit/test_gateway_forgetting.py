"""A gateway lets go of attempts that are over, however many end at once."""

from __future__ import annotations

import asyncio

import pytest

from agl_ray.gateway import attempts as rooms
from agl_ray.gateway.attempts import Attempts
from agl_ray.gateway.caller import CallPath
from agl_ray.store import LightningStore, StoreCore
from agl_ray.types import LLM, EndReason


@pytest.mark.parametrize("number", [3, 11])
def test_one_sweep_forgets_all_that_are_over(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "MOST_ASKED", 3)
    clock = [0.0]

    async def live() -> None:
        core = await StoreCore.open("memory://")
        store = LightningStore.local(core)
        try:
            await store.add_resources({"main": LLM(endpoint="http://x", model="m")})
            held = Attempts(store, 5.0, 900.0, now=lambda: clock[0])
            keys = []
            for _ in range(number + 1):
                one = await store.start_rollout({})
                key = (one.rollout_id, one.attempt_id)
                (await held.open(CallPath(*key, None))).open_calls -= 1
                keys.append(key)
            for key in keys[1:]:
                await store.end_attempt(*key, EndReason.OK, reward=0.0)
            clock[0] = rooms.SILENT_SECONDS + 1
            await held.open(CallPath(*keys[0], None))
            assert held._asking is not None
            await held._asking
            assert len(held) == 1
        finally:
            await core.close()

    asyncio.run(live())
