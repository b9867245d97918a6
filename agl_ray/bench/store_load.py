"""Spans, for a while: how many per second, how late, how many bytes each, and does the store's memory stay where it is?

`sustained` writes small batches as fast as a few writers can (closed loop); `calls` writes whole model calls (8k prompt ids, 1k response
ids, log-probabilities) and watches the memory of the store's process. Called by `agl_ray.bench.store`.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any, NamedTuple

import numpy as np

from agl_ray.bench.store_flow import Material, call_columns
from agl_ray.bench.store_places import Meter, Place, memory_mib
from agl_ray.spans import span_batch
from agl_ray.store import LightningStore
from agl_ray.types import AttemptedRollout, EndReason, RunError

WRITERS = 4
SPANS_PER_BATCH = 64
BATCHES_PER_ATTEMPT = 50
LONG_PROMPT, LONG_RESPONSE = 8192, 1024
CALLS_PER_ATTEMPT = 10
CALL_WRITERS = 4
WARM_SHARE = 0.2  # of the calls, before memory is looked at: the cache of payloads is full then
DIFFERENT_CALLS = 64


class Sustained(NamedTuple):
    """append_*: of one add_spans call with SPANS_PER_BATCH spans, from the call to the acknowledgement (it is on disk)."""

    spans_per_s: float
    append_p50_ms: float
    append_p99_ms: float
    cpu_ms_per_append: float
    foreign_share: float


class Calls(NamedTuple):
    calls_per_s: float
    rss_mib: float  # of the store's process at the end
    rss_growth_mib: float  # from the end of the warm-up to the end


async def sustained(place: Place, seconds: float) -> Sustained:
    """WRITERS writers, each sending one batch after the other; batches are built and packed inside the clock."""
    material = Material("light")
    took: list[float] = []
    num_spans = 0
    until = 0.0

    async def write() -> None:
        nonlocal num_spans
        while time.perf_counter() < until:
            attempt = await place.store.start_rollout(input={})
            key = (attempt.rollout_id, attempt.attempt_id)
            for _ in range(BATCHES_PER_ATTEMPT):
                batch = span_batch([material.row(*key) for _ in range(SPANS_PER_BATCH)])
                begin = time.perf_counter()
                await place.store.add_spans(*key, batch)
                took.append(time.perf_counter() - begin)
                num_spans += SPANS_PER_BATCH
            await place.store.end_attempt(*key, EndReason.OK, reward=1.0)

    until = time.perf_counter() + seconds / 5  # warm
    await asyncio.gather(*(write() for _ in range(WRITERS)))
    took.clear()
    num_spans = 0
    meter = Meter(place.pid)
    meter.start()
    until = time.perf_counter() + seconds
    await asyncio.gather(*(write() for _ in range(WRITERS)))
    meter.stop()
    p50, p99 = np.quantile(took, [0.5, 0.99])
    return Sustained(
        spans_per_s=num_spans / meter.seconds,
        append_p50_ms=1e3 * float(p50),
        append_p99_ms=1e3 * float(p99),
        cpu_ms_per_append=1e3 * meter.cpu_seconds / len(took),
        foreign_share=meter.foreign_share,
    )


async def calls(place: Place, number: int) -> Calls:
    """Write `number` calls into a fresh store."""
    writer = _CallWriter(place.store)
    warm = int(number * WARM_SHARE)
    begin = time.perf_counter()
    await writer.write(warm)
    rss = memory_mib(place.pid)
    await writer.write(number - warm)
    seconds = time.perf_counter() - begin
    end_rss = memory_mib(place.pid)
    counts = await place.store.statistics()
    if counts["spans"] != number:
        raise RunError(f"the benchmark's store has {counts['spans']} of {number} calls")
    return Calls(
        calls_per_s=number / seconds,
        rss_mib=end_rss,
        rss_growth_mib=end_rss - rss,
    )


class _CallWriter:
    """Different calls, made once; a batch is built from one for every write."""

    def __init__(self, store: LightningStore) -> None:
        chance = random.Random(0)
        self.store = store
        self._columns = [
            call_columns(chance, LONG_PROMPT, LONG_RESPONSE) for _ in range(DIFFERENT_CALLS)
        ]
        for (
            columns
        ) in self._columns:  # as the engine gives them: arrays, not lists of Python numbers
            columns["prompt_ids"] = np.array(columns["prompt_ids"], np.int32)
            columns["response_ids"] = np.array(columns["response_ids"], np.int32)
            columns["response_logprobs"] = np.array(columns["response_logprobs"], np.float32)
        self._written = 0

    async def write(self, number: int) -> None:
        left = iter(range(number))

        async def work() -> None:
            attempt: AttemptedRollout | None = None
            in_attempt = 0
            for _ in left:
                if attempt is None:
                    attempt = await self.store.start_rollout(input={})
                await self._call(attempt)
                in_attempt += 1
                if in_attempt == CALLS_PER_ATTEMPT:
                    await self._end(attempt)
                    attempt, in_attempt = None, 0
            if attempt is not None:
                await self._end(attempt)

        await asyncio.gather(*(work() for _ in range(CALL_WRITERS)))

    async def _call(self, attempt: AttemptedRollout) -> None:
        key = (attempt.rollout_id, attempt.attempt_id)
        self._written += 1
        row: dict[str, Any] = {
            "rollout_id": key[0],
            "attempt_id": key[1],
            "span_id": f"{self._written:016x}",
            "start_ns": self._written,
            "end_ns": self._written + 1,
            "status": "OK",
            **self._columns[self._written % DIFFERENT_CALLS],
        }
        await self.store.add_spans(*key, span_batch([row]))

    async def _end(self, attempt: AttemptedRollout) -> None:
        key = (attempt.rollout_id, attempt.attempt_id)
        await self.store.end_attempt(*key, EndReason.OK, reward=1.0)
