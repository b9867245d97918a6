"""One flow of the store, many times: take a rollout, send its spans, end its attempt.

Rollouts are queued before the clock starts. Two profiles, the same for us and for others:

- `light`: 4 spans of 8 text attributes of 100 characters. Ours go as a runner sends them: recorded while the agent runs, one Arrow batch
  that travels with the attempt's end. `single` is the same with a call of the store for every span; in `together` batch and end are two
  calls made at once, the end naming the number of spans.
- `heavy`: 4 model calls of 4,096 prompt ids, 200 response ids and their log-probabilities, a call of the store for each, as the gateway
  sends them.

Called by `agl_ray.bench.store`.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from agl_ray.bench.store_places import Meter
from agl_ray.spans import KIND_CALL, KIND_SPAN, span_batch
from agl_ray.store import LightningStore
from agl_ray.types import EndReason, EnqueueRolloutRequest, RunError

SPANS = 4
ATTRIBUTES, ATTRIBUTE_CHARS = 8, 100
PROMPT_IDS, RESPONSE_IDS = 4096, 200
ENQUEUE = 250  # rollouts per call before the clock starts


class FlowClient(Protocol):
    """What `run_flows` needs of a store."""

    async def enqueue(self, number: int) -> None: ...

    async def flow(self, worker_id: str) -> bool:
        """One flow; False when no rollout was waiting."""

    async def totals(self) -> tuple[int, int]:
        """(rollouts that succeeded, spans) in the store."""


class Flows(NamedTuple):
    """One measurement. cpu_ms: of client and store together, per flow. foreign_share: how much of the machine others used."""

    per_s: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    foreign_share: float


class Material:
    """Span columns made before the clock starts; rows are made afresh for each span, as a tracer or the gateway would."""

    def __init__(self, profile: str) -> None:
        self.profile = profile
        chance = random.Random(0)
        self._numbers = itertools.count(1)
        attributes = {f"k{i}": "v" * ATTRIBUTE_CHARS for i in range(ATTRIBUTES)}
        self._light = {"name": "step", "kind": KIND_SPAN, "attributes": attributes}
        self._heavy = [call_columns(chance, PROMPT_IDS, RESPONSE_IDS) for _ in range(8)]

    def row(self, rollout_id: str, attempt_id: str) -> dict[str, Any]:
        number = next(self._numbers)
        light = self.profile != "heavy"
        columns = self._light if light else self._heavy[number % len(self._heavy)]
        return {
            "rollout_id": rollout_id,
            "attempt_id": attempt_id,
            "span_id": f"{number:016x}",
            "start_ns": 1_000_000_000 * number,
            "end_ns": 1_000_000_000 * number + 500_000_000,
            "status": "OK",
            **columns,
        }


def call_columns(chance: random.Random, prompt: int, response: int) -> dict[str, Any]:
    """The columns of a model call with `prompt` and `response` token ids."""
    return {
        "name": "model.call",
        "kind": KIND_CALL,
        "model": "m",
        "dialect": "openai.chat",
        "prompt_ids": [chance.randrange(150_000) for _ in range(prompt)],
        "response_ids": [chance.randrange(150_000) for _ in range(response)],
        "response_logprobs": [-chance.random() for _ in range(response)],
        "weight_versions": [(0, 1)],
        "finish_reason": "stop",
        "prompt_tokens": prompt,
        "response_tokens": response,
    }


class StoreFlows:
    """Our flow, through a client of the store."""

    def __init__(self, store: LightningStore, profile: str) -> None:
        self.store, self.material = store, Material(profile)

    async def enqueue(self, number: int) -> None:
        for start in range(0, number, ENQUEUE):
            size = min(ENQUEUE, number - start)
            requests = [EnqueueRolloutRequest(input={"i": i}) for i in range(size)]
            await self.store.enqueue_many_rollouts(requests)

    async def flow(self, worker_id: str) -> bool:
        taken = await self.store.dequeue_rollout(worker_id=worker_id)
        if taken is None:
            return False
        key = (taken.rollout_id, taken.attempt_id)
        if self.material.profile == "together":
            adding = self.store.add_spans(*key, self._batch(key))
            await asyncio.gather(adding, self._end(key, expected_spans=SPANS))
            return True
        if self.material.profile == "light":
            await self._end(key, spans=self._batch(key))
            return True
        for _ in range(SPANS):
            await self.store.add_spans(*key, span_batch([self.material.row(*key)]))
        await self._end(key)
        return True

    def _batch(self, key: tuple[str, str]) -> pa.RecordBatch:
        return span_batch([self.material.row(*key) for _ in range(SPANS)])

    async def _end(self, key: tuple[str, str], **given: Any) -> None:
        await self.store.end_attempt(*key, EndReason.OK, reward=1.0, **given)

    async def totals(self) -> tuple[int, int]:
        counts = await self.store.statistics()
        return counts["rollouts_by_status"]["succeeded"], counts["spans"]


async def run_flows(client: FlowClient, pid: int, number: int, in_flight: int) -> Flows:
    """`number` flows, `in_flight` at a time, after a warm-up. pid: of the store's process. RunError where the store does not have all of them afterwards."""
    before = await client.totals()
    warm = 2 * in_flight
    await _drain(client, warm, in_flight)
    meter = Meter(pid)
    await client.enqueue(number)
    meter.start()
    took = await _drain(client, 0, in_flight)
    meter.stop()
    after = await client.totals()
    done = warm + number
    expected = (before[0] + done, before[1] + SPANS * done)
    if len(took) != number or after != expected:
        raise RunError(
            f"the benchmark's store has {after} (rollouts, spans) after {len(took)} flows: expected {expected}"
        )
    took.sort()
    return Flows(
        per_s=number / meter.seconds,
        p50_ms=1e3 * took[number // 2],
        p99_ms=1e3 * took[int(number * 0.99)],
        cpu_ms=1e3 * meter.cpu_seconds / number,
        foreign_share=meter.foreign_share,
    )


async def _drain(client: FlowClient, number: int, in_flight: int) -> list[float]:
    """Queue `number` rollouts and run flows until none is left; seconds of each."""
    if number:
        await client.enqueue(number)
    took: list[float] = []

    async def work(worker_id: str) -> None:
        while True:
            begin = time.perf_counter()
            if not await client.flow(worker_id):
                return
            took.append(time.perf_counter() - begin)

    await asyncio.gather(*(work(f"w{i}") for i in range(in_flight)))
    return took
