"""A gateway lets go of attempts that are over, however many end at once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from gateway_fakes import FakeStore

from agl_ray.gateway import attempts as rooms
from agl_ray.gateway.attempts import Attempts
from agl_ray.gateway.caller import CallPath
from agl_ray.gateway.canonical import Refusal
from agl_ray.store import LightningStore, StoreCore
from agl_ray.types import LLM, EndReason, replace


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


def test_attempts_that_nobody_knows_leave_nothing_behind() -> None:
    held = Attempts(FakeStore(), 5.0, 900.0)

    async def run() -> None:
        for number in range(50):
            with pytest.raises(Refusal, match="not known"):
                await held.open(CallPath(f"ro-unknown-{number}", "at-1"))

    asyncio.run(run())
    assert (len(held), len(held._resolving)) == (0, 0)


def test_calls_that_wait_while_a_resolution_fails_resolve_one_after_another() -> None:
    """The first fails, the second waits for it, the third comes when the second has begun: one attempt, not two."""
    store = FakeStore()
    held = Attempts(store, 5.0, 900.0)
    path, asked = CallPath("ro-1", "at-1"), []
    known = store.get_rollout_in_full
    gates, second = [asyncio.Event(), asyncio.Event()], asyncio.Event()

    async def slow(rollout_id: str) -> Any:
        number = len(asked)
        asked.append(number)
        if number == 1:
            second.set()
        await gates[number].wait()
        return None if number == 0 else await known(rollout_id)

    store.get_rollout_in_full = slow  # type: ignore[method-assign]

    async def run() -> None:
        calls = [asyncio.create_task(held.open(path)) for _ in range(2)]
        await asyncio.sleep(0)
        gates[0].set()
        with pytest.raises(Refusal, match="not known"):
            await calls[0]
        await second.wait()
        third = asyncio.create_task(held.open(path))
        await asyncio.sleep(0)
        gates[1].set()
        assert await calls[1] is await third
        assert len(asked) == 2

    asyncio.run(run())
    assert len(held._resolving) == 0


def test_an_attempt_is_not_forgotten_while_a_call_of_it_waits_for_the_store() -> None:
    """Or its next call would find another conversation than the one that this call goes on with."""
    clock, store, asking, go = [0.0], FakeStore(), asyncio.Event(), asyncio.Event()
    held = Attempts(store, 5.0, 900.0, now=lambda: clock[0])
    path, latest = CallPath("ro-1", "at-1"), store.get_latest_attempt

    async def slow(rollout_id: str) -> Any:
        asking.set()
        await go.wait()
        return await latest(rollout_id)

    async def run() -> None:
        (await held.open(path)).open_calls -= 1
        clock[0] = 899.0
        held._swept = 899.0  # just now
        store.get_latest_attempt = slow  # type: ignore[method-assign]
        call = asyncio.create_task(held.open(path))
        await asking.wait()
        clock[0] = 905.0
        another = asyncio.create_task(held.open(path))
        await asyncio.sleep(0)
        go.set()
        assert await call is await another
        assert (await call).open_calls == 2
        store.attempt = replace(store.attempt, attempt_id="at-2")
        clock[0] = 910.0
        with pytest.raises(Refusal, match="not the live one"):
            await held.open(path)
        assert (await call).open_calls == 2

    asyncio.run(run())
