"""Load on a store, with a note of everything that it acknowledged, and the check that all of it is there, once.

`Load(store, note)` enqueues, leases, adds spans and ends attempts until it is stopped; `note(kind, ...)` is called after each answer.
Run as a program (`python tests/store_load.py URL RUN_ID ROUND`) it is one sitting of a store with its load in one process, which
prints its notes as JSON lines until somebody kills it. `Seen` gathers notes; `check` compares them with the journal. Used by
tests/faults/test_store_postgres_faults.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from agl_ray.spans import span_batch
from agl_ray.store import LightningStore, StoreCore
from agl_ray.store.journals.base import Query
from agl_ray.store.journals.opening import open_journal
from agl_ray.store.journals.settings import JournalSettings
from agl_ray.types import (
    Attempt,
    EndReason,
    EnqueueRolloutRequest,
    Rollout,
    RolloutConfig,
    from_json,
)

WORKERS = 6
SPANS = 4  # calls per attempt
CONFIG = RolloutConfig(max_attempts=1000, retry_condition=("lost",))

Note = Callable[..., None]
Key = tuple[str, str]


def spans_of(key: Key, names: Sequence[str]) -> Any:
    row: dict[str, Any] = {"rollout_id": key[0], "attempt_id": key[1], "name": "n", "kind": "span"}
    row |= {"start_ns": 1, "end_ns": 2, "status": "OK", "attributes": {"x": "y" * 200}}
    return span_batch([{**row, "span_id": name} for name in names])


class Load:
    def __init__(self, store: LightningStore, name: str, note: Note) -> None:
        self.store, self.name, self.note = store, name, note
        self.rng = random.Random(name)
        self.stopping = False

    async def run(self) -> None:
        """Until `stopping`; an error of the store ends it."""
        await asyncio.gather(self._enqueue(), *(self._work(f"w{i}") for i in range(WORKERS)))

    async def _enqueue(self) -> None:
        number = 0
        while not self.stopping:
            ids = [f"ro-{self.name}-{number + i}" for i in range(10)]
            number += 10
            wanted = [
                EnqueueRolloutRequest(input={"i": name}, rollout_id=name, config=CONFIG)
                for name in ids
            ]
            for rollout in await self.store.enqueue_many_rollouts(wanted):
                self.note("rollout", rollout.rollout_id)
            await asyncio.sleep(0.03)

    async def _work(self, worker: str) -> None:
        while not self.stopping:
            taken = await self.store.dequeue_many_rollouts(
                limit=3, worker_id=f"{self.name}-{worker}", wait_seconds=1.0
            )
            await asyncio.gather(
                *(self._attempt((one.rollout_id, one.attempt_id)) for one in taken)
            )
            name = f"{self.name}/{worker}/{self.rng.random()}"
            await self.store.put_state(name, name.encode())
            self.note("state", name)

    async def _attempt(self, key: Key) -> None:
        self.note("lease", *key)

        async def span(number: int) -> None:
            names = [f"{key[0]}.{key[1]}.{number}.{i}" for i in range(2)]
            sequences = await self.store.add_spans(*key, spans_of(key, names))
            for name, sequence in zip(names, sequences, strict=True):
                self.note("span", *key, name, sequence)

        await asyncio.gather(*(span(number) for number in range(SPANS)))
        reward = self.rng.random()
        ended = await self.store.end_attempt(
            *key, EndReason.OK, reward=reward, expected_spans=2 * SPANS
        )
        assert ended.end_reason is EndReason.OK, ended
        self.note("end", *key, reward)


class Seen:
    """Notes, by kind."""

    def __init__(self) -> None:
        self.rollouts: list[str] = []
        self.states: list[str] = []
        self.leases: list[Key] = []
        self.spans: dict[str, tuple[str, str, int]] = {}
        self.rewards: dict[Key, float] = {}

    def note(self, kind: str, *what: Any) -> None:
        if kind == "rollout":
            self.rollouts.append(what[0])
        elif kind == "state":
            self.states.append(what[0])
        elif kind == "lease":
            self.leases.append((what[0], what[1]))
        elif kind == "span":
            assert what[2] not in self.spans
            self.spans[what[2]] = (what[0], what[1], what[3])
        elif kind == "end":
            self.rewards[what[0], what[1]] = what[2]


async def check(url: str, settings: JournalSettings, seen: Seen) -> dict[str, int]:
    """Everything acknowledged is in the journal, nothing is there twice. Gives what was counted."""
    journal = open_journal(url, settings)
    live = await journal.open(must_exist=True)
    rollout_rows = (await journal.query(Query("rollout"))).rows
    attempt_rows = (await journal.query(Query("attempt"))).rows
    states = await journal.keys("state", "")
    await journal.close()
    assert len({row.key for row in rollout_rows}) == len(rollout_rows)
    rollouts = {row.key: from_json(row.body, Rollout) for row in rollout_rows}
    assert set(seen.rollouts) <= set(rollouts)
    assert all(one.input == {"i": name} for name, one in rollouts.items())
    attempts: dict[Key, Attempt] = {}
    of_rollout = defaultdict(list)
    for row in attempt_rows:
        one = from_json(row.body, Attempt)
        assert (one.rollout_id, one.attempt_id) not in attempts
        attempts[one.rollout_id, one.attempt_id] = one
        of_rollout[one.rollout_id].append(one)
    check_attempts(seen, attempts, of_rollout)
    assert set(seen.states) <= set(states)
    spans = await check_spans(url, settings, seen, list(attempts))
    assert spans == live.num_spans
    return {"starts": live.starts, "rollouts": len(rollouts), "attempts": len(attempts), "spans": spans}  # fmt: skip


def check_attempts(
    seen: Seen, attempts: dict[Key, Attempt], of_rollout: dict[str, list[Attempt]]
) -> None:
    assert max(Counter(seen.leases).values()) == 1  # no attempt was given out twice
    assert set(seen.leases) <= set(attempts)
    for key, reward in seen.rewards.items():
        assert (attempts[key].end_reason, attempts[key].reward) == (EndReason.OK, reward)
    for tries in of_rollout.values():
        assert sorted(one.sequence_id for one in tries) == list(range(1, len(tries) + 1))
        ends = [one.end_reason for one in sorted(tries, key=lambda one: one.sequence_id)]
        # Another attempt is only made after the one before was lost; so no reward is there twice.
        assert all(end is EndReason.LOST for end in ends[:-1])


async def check_spans(url: str, settings: JournalSettings, seen: Seen, keys: Sequence[Key]) -> int:
    core = await StoreCore.open(url, settings=settings, must_exist=True, lease_seconds=600.0)
    table = await LightningStore.local(core).read_spans(keys)
    await core.close()
    names = ("rollout_id", "attempt_id", "sequence_id")
    places = list(zip(*(table[name].to_pylist() for name in names), strict=True))
    stored = dict(zip(table["span_id"].to_pylist(), places, strict=True))
    assert len(stored) == table.num_rows  # no span twice
    assert {name: stored.get(name) for name in seen.spans} == seen.spans
    assert len({(place[0], place[2]) for place in places}) == len(places)  # no sequence id twice
    return int(table.num_rows)


async def sitting(url: str, run_id: str, number: int) -> None:
    core = await StoreCore.open(
        url, settings=JournalSettings(run_id=run_id), must_exist=number > 0, lease_seconds=600.0
    )

    def note(kind: str, *what: Any) -> None:
        os.write(1, json.dumps([kind, *what]).encode() + b"\n")

    note("open")
    store = LightningStore.local(core)
    for worker in range(
        WORKERS
    ):  # of the sitting that was killed; its leases would end by themselves, by the clock
        await store.worker_lost(f"{number - 1}-w{worker}", "it was killed")
    await Load(store, str(number), note).run()


if __name__ == "__main__":
    asyncio.run(sitting(sys.argv[1], sys.argv[2], int(sys.argv[3])))
