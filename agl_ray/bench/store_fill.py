"""A store with a past: N finished rollouts, each with its attempt and two spans, put into a journal in bulk.

Going through the store would take an hour for a million; the rows are those that it would have written. Called by
`agl_ray.bench.store_growth`. Test alone: tests/unit/test_bench_store.py.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from agl_ray.spans import KIND_SPAN, span_batch
from agl_ray.store.journals.base import Row, SpanRow
from agl_ray.store.journals.opening import open_journal
from agl_ray.store.payload import pack
from agl_ray.store.rows import row_of
from agl_ray.types import (
    LLM,
    Attempt,
    AttemptStatus,
    EndReason,
    ResourcesUpdate,
    Rollout,
    RolloutStatus,
    Worker,
    replace,
)

PER_TRANSACTION = 5000  # rollouts
NUM_SPANS = 2
RESOURCES_ID = "rs-000000000000"
BEGIN = 1_700_000_000.0  # start of the first rollout; one starts every second
_TEMPLATE = ("ro-ffffffffffff", "at-ffffffff")  # ids as long as all ids are


def rollout_ids(number: int) -> Iterator[str]:
    """The same ids for every size: the first ones of a larger store are those of a smaller."""
    chance = random.Random(0)
    for _ in range(number):
        yield f"ro-{chance.getrandbits(48):012x}"


def attempt_id_of(rollout_id: str) -> str:
    return f"at-{rollout_id[3:11]}"


async def fill(url: str, number: int) -> None:
    """Write the past of `number` rollouts into the empty journal at `url`."""
    journal = open_journal(url)
    await journal.open()
    try:
        await journal.write([*_surroundings()], [])
        payload, _ = pack(_template_batch(), _TEMPLATE)
        rows: list[Row] = []
        spans: list[SpanRow] = []
        for place, rollout_id in enumerate(rollout_ids(number), start=1):
            rows += _records(rollout_id, place)
            spans.append(_spans(rollout_id, payload))
            if len(spans) == PER_TRANSACTION:
                await journal.write(rows, spans)
                rows, spans = [], []
        await journal.write(rows, spans)
    finally:
        await journal.close()


def _surroundings() -> Iterator[Row]:
    update = ResourcesUpdate(
        resources_id=RESOURCES_ID,
        create_time=BEGIN,
        update_time=BEGIN,
        version=1,
        resources={"main_llm": LLM(endpoint="http://localhost", model="m")},
    )
    yield row_of("resources", RESOURCES_ID, 1, update)
    for i in range(4):
        worker = Worker(worker_id=f"runner-{i}", status="idle")
        yield row_of("worker", worker.worker_id, 0, worker)
    yield row_of("state", "position", 0, b"0")


_ROLLOUT = Rollout(
    rollout_id="",
    input={"question": "what is 1 plus 1?"},
    start_time=BEGIN,
    mode="train",
    resources_id=RESOURCES_ID,
    status=RolloutStatus.SUCCEEDED,
    num_attempts=1,
)
_ATTEMPT = Attempt(
    rollout_id="",
    attempt_id="",
    sequence_id=1,
    start_time=BEGIN,
    status=AttemptStatus.SUCCEEDED,
    end_reason=EndReason.OK,
    reward=1.0,
    worker_id="runner-0",
    num_spans=NUM_SPANS,
)


def _records(rollout_id: str, place: int) -> Iterator[Row]:
    start, end = BEGIN + place, BEGIN + place + 0.5
    failed = place % 10 == 0
    rollout = replace(
        _ROLLOUT,
        rollout_id=rollout_id,
        start_time=start,
        end_time=end,
        status=RolloutStatus.FAILED if failed else RolloutStatus.SUCCEEDED,
        mode="val" if place % 4 == 0 else "train",
        metadata={"step": place // 128, "group_index": place % 8},
    )
    attempt = replace(
        _ATTEMPT,
        rollout_id=rollout_id,
        attempt_id=attempt_id_of(rollout_id),
        start_time=start,
        end_time=end,
        status=AttemptStatus.FAILED if failed else AttemptStatus.SUCCEEDED,
        end_reason=EndReason.AGENT_ERROR if failed else EndReason.OK,
        reward=None if failed else 1.0,
    )
    yield row_of("rollout", rollout_id, 0, rollout, place)
    yield row_of("attempt", f"{rollout_id}/{attempt.attempt_id}", 1, attempt)


def _template_batch() -> Any:
    common = {"kind": KIND_SPAN, "start_ns": 1, "end_ns": 2, "status": "OK"}
    ids = {"rollout_id": _TEMPLATE[0], "attempt_id": _TEMPLATE[1]}
    rows = [{**ids, **common, "span_id": f"{i:016x}", "name": "step"} for i in range(NUM_SPANS)]
    return span_batch(rows)


def _spans(rollout_id: str, payload: bytes) -> SpanRow:
    """The template's payload with these ids: as they are as long, nothing in it moves."""
    key = (rollout_id, attempt_id_of(rollout_id))
    for old, new in zip(_TEMPLATE, key, strict=True):
        payload = payload.replace(old.encode(), new.encode())
    return SpanRow(f"{key[1]}-end", key, 1, NUM_SPANS, payload)
