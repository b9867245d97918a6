"""Does any operation of the store grow dearer with its past?

Stores with different numbers of finished rollouts are open at the same time in this process, each over its SQLite journal; every
operation is timed on one after the other, round after round, so that whatever else the machine does hits all sizes alike. What an
operation touches is chosen at random from the whole past. Called by `agl_ray.bench.store`.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agl_ray.bench.store_fill import RESOURCES_ID, attempt_id_of, fill, rollout_ids
from agl_ray.bench.store_flow import Material
from agl_ray.bench.store_places import in_process
from agl_ray.spans import span_batch
from agl_ray.store import LightningStore
from agl_ray.types import LLM, EndReason

SAMPLE = 1000  # old rollouts that operations choose from
PAGE = 50
LEASE_SECONDS = 86_400.0  # the smaller stores' attempts stay open while a larger store is filled


class Subject:
    """A store of one size, and what its operations need."""

    def __init__(self, size: int, store: LightningStore) -> None:
        self.size, self.store = size, store
        self.material = Material("light")
        self._chance = random.Random(1)
        ids = list(rollout_ids(size))
        self._sample = [ids[self._chance.randrange(size)] for _ in range(min(SAMPLE, size))]
        self.open: list[tuple[str, str]] = []

    def old(self) -> str:
        """A finished rollout."""
        return self._chance.choice(self._sample)

    async def prepare(self, rounds: int) -> None:
        """Rollouts that the rounds will use up."""
        for _ in range(2 * rounds):
            await self.store.enqueue_rollout({"question": "new"}, mode="train")
        for _ in range(3 * rounds):
            started = await self.store.start_rollout({"question": "new"})
            self.open.append((started.rollout_id, started.attempt_id))


Operation = Callable[[Subject], Awaitable[Any]]


async def _add_spans(one: Subject) -> None:
    key = one.open[0]
    await one.store.add_spans(*key, span_batch([one.material.row(*key)]))


async def _late_spans(one: Subject) -> None:
    rollout_id = one.old()
    key = (rollout_id, attempt_id_of(rollout_id))
    await one.store.add_spans(*key, span_batch([one.material.row(*key)]))


async def _read_spans(one: Subject) -> None:
    rollout_id = one.old()
    await one.store.read_spans([(rollout_id, attempt_id_of(rollout_id))])


OPERATIONS: dict[str, Operation] = {
    "enqueue_rollout": lambda one: one.store.enqueue_rollout({"question": "new"}, mode="train"),
    "dequeue_rollout": lambda one: one.store.dequeue_rollout("runner-0"),
    "start_rollout": lambda one: one.store.start_rollout({"question": "new"}),
    "start_attempt": lambda one: one.store.start_attempt(one.open.pop()[0]),
    "add_spans": _add_spans,
    "add_spans_late": _late_spans,
    "end_attempt": lambda one: one.store.end_attempt(*one.open.pop(), EndReason.OK, reward=1.0),
    "cancel_rollouts": lambda one: one.store.cancel_rollouts([one.open.pop()[0]]),
    "update_rollout_old": lambda one: one.store.update_rollout(one.old(), metadata={"a": 1}),
    "update_attempt_old": lambda one: one.store.update_attempt(
        one.old(), "latest", metadata={"a": 1}
    ),
    "get_rollout_by_id_old": lambda one: one.store.get_rollout_by_id(one.old()),
    "get_rollout_by_id_unknown": lambda one: one.store.get_rollout_by_id("ro-unknown"),
    "get_latest_attempt_old": lambda one: one.store.get_latest_attempt(one.old()),
    "query_attempts_old": lambda one: one.store.query_attempts(one.old()),
    "query_rollouts_first": lambda one: one.store.query_rollouts(limit=PAGE),
    "query_rollouts_newest": lambda one: one.store.query_rollouts(
        limit=PAGE, sort_by="start_time", sort_order="desc"
    ),
    "query_rollouts_status": lambda one: one.store.query_rollouts(status_in=["failed"], limit=PAGE),
    "query_rollouts_mode": lambda one: one.store.query_rollouts(mode="val", limit=PAGE),
    "query_rollouts_ids": lambda one: one.store.query_rollouts(
        rollout_id_in=[one.old() for _ in range(10)]
    ),
    "query_rollouts_middle": lambda one: one.store.query_rollouts(limit=PAGE, offset=one.size // 2),
    "wait_for_rollouts_old": lambda one: one.store.wait_for_rollouts(
        rollout_ids=[one.old() for _ in range(10)], timeout=1.0
    ),
    "query_spans_old": lambda one: one.store.query_spans(one.old()),
    "read_spans_old": _read_spans,
    "add_resources": lambda one: one.store.add_resources(
        {"main_llm": LLM(endpoint="http://localhost", model="m")}
    ),
    "get_latest_resources": lambda one: one.store.get_latest_resources(),
    "get_resources_by_id": lambda one: one.store.get_resources_by_id(RESOURCES_ID),
    "update_worker": lambda one: one.store.update_worker("runner-1", {"cpu": 1}),
    "query_workers": lambda one: one.store.query_workers(),
    "put_state": lambda one: one.store.put_state("position", b"1"),
    "get_state": lambda one: one.store.get_state("position"),
    "statistics": lambda one: one.store.statistics(),
}


async def measure_growth(
    folder: Path, sizes: Sequence[int], rounds: int
) -> tuple[dict[str, dict[int, float]], dict[int, float]]:
    """(median milliseconds by operation and size, seconds to open a store by size).

    A size's journal is made in `folder` first."""
    opened: dict[int, float] = {}
    async with contextlib.AsyncExitStack() as stack:
        subjects = []
        for size in sizes:
            url = f"sqlite:///{folder}/growth-{size}.db"
            await fill(url, size)
            begin = time.perf_counter()
            place = await stack.enter_async_context(in_process(url, lease_seconds=LEASE_SECONDS))
            opened[size] = time.perf_counter() - begin
            subjects.append(Subject(size, place.store))
            await subjects[-1].prepare(rounds)
        table = {name: await _time(run, subjects, rounds) for name, run in OPERATIONS.items()}
    return table, opened


async def _time(run: Operation, subjects: Sequence[Subject], rounds: int) -> dict[int, float]:
    took: dict[int, list[float]] = {one.size: [] for one in subjects}
    for _ in range(rounds):
        for one in subjects:
            begin = time.perf_counter()
            await run(one)
            took[one.size].append(time.perf_counter() - begin)
    return {size: 1e3 * float(np.median(values)) for size, values in took.items()}


def worst(table: dict[str, dict[int, float]], large: int, small: int) -> tuple[float, str]:
    """(largest ratio of an operation's time at `large` to its time at `small`, its name)."""
    ratios = {name: times[large] / times[small] for name, times in table.items()}
    name = max(ratios, key=ratios.__getitem__)
    return ratios[name], name
