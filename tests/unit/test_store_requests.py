"""Request ids: a repeated dequeue or start gives its first answer again, over restarts and a small memory, and takes nothing twice."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from agl_ray.store import LightningStore, StoreCore
from agl_ray.store.requests import OWN, Requests
from agl_ray.types import Attempt, Conflict, EndReason, InputError


def attempt(number: int, request_id: str) -> Attempt:
    return Attempt(
        rollout_id=f"ro-{number}",
        attempt_id="at-1",
        sequence_id=1,
        start_time=0.0,
        metadata={"request_id": request_id},
    )


def test_ids_of_callers_are_kept_within_a_bound_and_our_own_while_open() -> None:
    requests = Requests(most=2)
    for number, name in enumerate([f"{OWN}-1", "a", "a", "b"]):
        requests.began(attempt(number, name))
    assert requests.made_by("a") == [("ro-1", "at-1"), ("ro-2", "at-1")]
    requests.ended(attempt(0, f"{OWN}-1"))
    requests.ended(attempt(1, "a"))
    assert not requests.made_by(f"{OWN}-1")
    assert len(requests.made_by("a")) == 2
    requests.began(
        attempt(4, "c")
    )  # the third: `a` is kept no more, and known as far as it is open
    assert requests.made_by("a") == [("ro-2", "at-1")]
    requests.forgotten([attempt(4, "c"), attempt(3, "b")])
    assert list(requests.kept) == []
    assert not requests.made_by(None)


def test_a_repeated_dequeue_takes_nothing_more(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/store.db"

    async def first() -> list[str]:
        core = await StoreCore.open(url, memory_mib=0.004)
        store = LightningStore.local(core)
        for number in range(6):
            await store.enqueue_rollout({"number": number, "text": "x" * 2000})
        taken = await store.dequeue_many_rollouts(limit=2, worker_id="w", request_id="one")
        ids = [one.attempt_id for one in taken]
        await store.end_attempt(taken[0].rollout_id, ids[0], EndReason.OK, reward=1.0)
        for one in await store.dequeue_many_rollouts(limit=3, request_id="two"):
            await store.end_attempt(one.rollout_id, one.attempt_id, EndReason.OK, reward=0.0)
        assert taken[0].rollout_id not in core.machine.state.rollouts  # it has left memory
        again = await store.dequeue_many_rollouts(limit=2, worker_id="w", request_id="one")
        assert [one.attempt_id for one in again] == ids
        assert [one.attempt.end_reason for one in again] == [EndReason.OK, None]
        two = await store.dequeue_many_rollouts(limit=3, request_id="two")
        assert len(two) == 3
        assert (await store.statistics())["queue"] == 1
        await store.end_attempt(taken[1].rollout_id, ids[1], EndReason.OK)
        await store.forget_rollouts([one.rollout_id for one in taken])
        (last,) = await store.dequeue_many_rollouts(limit=2, worker_id="w", request_id="one")
        assert last.rollout.input["number"] == 5
        await core.close()
        return [last.attempt_id]

    async def second(ids: list[str]) -> None:
        """What is open is known after a restart."""
        core = await StoreCore.open(url, must_exist=True)
        store = LightningStore.local(core)
        await store.enqueue_rollout("more")
        again = await store.dequeue_many_rollouts(limit=5, worker_id="w", request_id="one")
        assert [one.attempt_id for one in again] == ids
        await core.close()

    asyncio.run(second(asyncio.run(first())))


def test_a_repeated_start_is_known_for_ever(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/store.db"

    async def once(names: list[str]) -> list[str]:
        core = await StoreCore.open(url)
        store = LightningStore.local(core)
        made = await store.start_rollout({"q": 1}, worker_id="w", request_id="make")
        more = await store.start_attempt(made.rollout_id, request_id="more")
        assert (made.attempt.sequence_id, more.attempt.sequence_id) == (1, 2)
        if not names:
            for one in (made, more):
                await store.end_attempt(one.rollout_id, one.attempt_id, EndReason.OK)
        with pytest.raises(Conflict, match="'make' was used for another rollout"):
            await store.start_rollout({"q": 2}, request_id="make")
        with pytest.raises(InputError, match="the client's own"):
            await store.dequeue_many_rollouts(request_id=f"{OWN}-1")
        assert (await store.statistics())["attempts"] == 2
        await core.close()
        return [made.rollout_id, made.attempt_id, more.attempt_id]

    names = asyncio.run(once([]))
    assert asyncio.run(once(names)) == names


def test_a_request_id_names_one_rollout() -> None:
    async def main() -> None:
        core = await StoreCore.open("memory://")
        store = LightningStore.local(core)
        a, b = [await store.enqueue_rollout(name) for name in "ab"]
        await store.start_attempt(a.rollout_id, request_id="x")
        with pytest.raises(Conflict, match="fresh one"):
            await store.start_attempt(b.rollout_id, request_id="x")
        await core.close()

    asyncio.run(main())
