"""Change events: order, cursor, replay over a restart, long poll, forgetting, and that they are told only once journalled."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from agl_ray.store import LightningStore, client
from agl_ray.store import events as module
from agl_ray.store.core import StoreCore
from agl_ray.types import EndReason, NotFound, StoreError, StoreEvent


async def one_rollout(store: LightningStore) -> str:
    """A rollout from the queue to its end; its id."""
    rollout = await store.enqueue_rollout("x", mode="train")
    taken = await store.dequeue_rollout(worker_id="w")
    assert taken is not None
    await store.end_attempt(taken.rollout_id, taken.attempt_id, EndReason.OK, reward=0.5)
    return rollout.rollout_id


def statuses(events: tuple[StoreEvent, ...], key: str) -> list[str | None]:
    return [event.status for event in events if event.key == key]


def test_a_rollouts_life_is_told_in_order_with_numbers_without_gaps(tmp_path: Path) -> None:
    async def main() -> None:
        core = await StoreCore.open(f"sqlite:///{tmp_path / 's.db'}")
        store = LightningStore.local(core)
        rollout_id = await one_rollout(store)
        page = await store.read_events()
        assert [event.number for event in page.events] == list(range(1, page.next + 1))
        assert statuses(page.events, rollout_id) == ["queuing", "preparing", "succeeded"]
        ends = [event for event in page.events if event.kind == "attempt" and event.end_reason]
        assert [(event.end_reason, event.reward) for event in ends] == [("ok", 0.5)]
        assert {event.mode for event in page.events if event.kind == "rollout"} == {"train"}
        assert (await store.read_events(page.next)).events == ()
        two = await store.read_events(1, limit=2)
        assert [event.number for event in two.events] == [2, 3]
        await core.close()

    asyncio.run(main())


def test_a_waiting_reader_gets_the_event_when_it_is_journalled() -> None:
    async def main() -> None:
        core = await StoreCore.open("memory://")
        store = LightningStore.local(core)
        reader = asyncio.ensure_future(store.read_events(0, wait_seconds=30))
        await asyncio.sleep(0.05)
        assert not reader.done()
        resources = await store.add_resources({})
        (event,) = (await asyncio.wait_for(reader, 60)).events
        assert (event.kind, event.key, event.version) == ("resources", resources.resources_id, 1)
        assert (await store.read_events(event.number, wait_seconds=0.05)).events == ()
        await core.close()

    asyncio.run(main())


def test_who_asks_for_no_event_waits_for_none_and_asks_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Asked again and again until the time is up, the store would do nothing else."""
    asked = []

    async def main() -> None:
        core = await StoreCore.open("memory://")
        store = LightningStore.local(core)
        monkeypatch.setattr(client, "SLICE_SECONDS", 0.1)
        read = core.read_events
        monkeypatch.setattr(
            core, "read_events", lambda *given: (asked.append(given), read(*given))[1]
        )
        for after in (0, 1):  # with an event there, and without one
            await store.add_resources({})
            page = await store.read_events(2 * after, limit=0, wait_seconds=1.0)
            assert (page.events, page.next) == ((), 2 * after)
        await core.close()

    asyncio.run(main())
    assert len(asked) == 2


def test_a_restart_replays_from_any_cursor_and_numbers_go_on(tmp_path: Path) -> None:
    async def main() -> None:
        url = f"sqlite:///{tmp_path / 's.db'}"
        core = await StoreCore.open(url)
        before = LightningStore.local(core)
        await one_rollout(before)
        old = await before.read_events()
        await core.close()
        core = await StoreCore.open(url)
        after = LightningStore.local(core)
        assert (await after.read_events()).events == old.events
        assert (await after.read_events(3)).events == old.events[3:]
        await after.add_resources({})
        assert (await after.read_events(old.next)).events[0].number == old.next + 1
        await core.close()

    asyncio.run(main())


def test_old_events_are_forgotten_and_who_missed_some_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "RECENT", 5)

    async def main() -> None:
        core = await StoreCore.open("memory://")
        core._events = module.EventLog(core._journal, core._fail, keep=20)
        store = LightningStore.local(core)
        for i in range(40):
            await store.put_state(f"k{i}", b"")
        await asyncio.sleep(0.05)
        page = await store.read_events(39)
        assert page.events[-1].number == 40
        assert page.oldest > 1
        assert [e.number for e in (await store.read_events(page.oldest - 1)).events] == list(
            range(page.oldest, 41)
        )
        with pytest.raises(NotFound, match=rf"events 1 to {page.oldest - 1} are not kept any more"):
            await anext(store.events())
        await core.close()

    asyncio.run(main())


def test_a_subscriber_follows_as_it_happens() -> None:
    async def main() -> None:
        core = await StoreCore.open("memory://")
        store = LightningStore.local(core)
        seen: list[str] = []

        async def follow() -> None:
            async for event in store.events():
                seen.append(event.key)
                if len(seen) == 3:
                    return

        follower = asyncio.ensure_future(follow())
        for key in ("a", "b", "c"):
            await store.put_state(key, b"")
        await asyncio.wait_for(follower, 60)
        assert seen == ["a", "b", "c"]
        await core.close()

    asyncio.run(main())


def test_waiting_readers_hear_that_the_store_has_ended() -> None:
    async def main() -> None:
        core = await StoreCore.open("memory://")
        reader = asyncio.ensure_future(core.read_events(0, 10, 30.0))
        await asyncio.sleep(0.02)
        await core.close()
        with pytest.raises(Exception, match="shut down"):
            await asyncio.wait_for(reader, 60)

    asyncio.run(main())


def test_a_journal_that_cannot_forget_ends_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        core = await StoreCore.open("memory://")
        core._events = module.EventLog(core._journal, core._fail, keep=5)

        async def broken(up_to: int) -> None:
            raise StoreError("the disk is gone")

        monkeypatch.setattr(core._journal, "drop_events", broken)
        for i in range(8):
            await core.put_state(f"k{i}", b"")
            if core.failure is not None:
                break
            await asyncio.sleep(0)
        assert "the disk is gone" in str(core.failure)
        await core.close()

    asyncio.run(main())
