"""What the scenarios of the catalogue share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from agl_ray.spans import span_batch
from agl_ray.store import LightningStore
from agl_ray.types import LLM, Attempt, AttemptedRollout, EndReason, EnqueueRolloutRequest, Span

Scenario = Callable[..., Awaitable[None]]
Restart = Callable[[], Awaitable[LightningStore]]
S = TypeVar("S", bound=Scenario)

MODEL = LLM(endpoint="http://127.0.0.1:1", model="tiny")
OTHER = LLM(endpoint="http://127.0.0.1:2", model="small")


def needs(**options: Any) -> Callable[[S], S]:
    """The scenario wants a store opened with these options."""

    def mark(scenario: S) -> S:
        scenario.options = options  # type: ignore[attr-defined]
        return scenario

    return mark


def key_of(attempt: AttemptedRollout | Attempt) -> tuple[str, str]:
    return (attempt.rollout_id, attempt.attempt_id)


def a_span(attempt: AttemptedRollout | Attempt, span_id: str | None = None, **fields: Any) -> Span:
    given = {"name": span_id or "step", "span_id": span_id, "start_time": 1.0, "end_time": 2.0}
    return Span(rollout_id=attempt.rollout_id, attempt_id=attempt.attempt_id, **{**given, **fields})


def a_batch(attempt: AttemptedRollout | Attempt, *names: str) -> Any:
    common = {"kind": "span", "start_ns": 1, "end_ns": 2, "status": "OK"}
    common |= {"rollout_id": attempt.rollout_id, "attempt_id": attempt.attempt_id}
    return span_batch([{**common, "span_id": name, "name": name} for name in names])


async def queued(store: LightningStore, *inputs: Any, **fields: Any) -> list[str]:
    """Enqueue one rollout per input; their ids."""
    requests = [EnqueueRolloutRequest(input=one, **fields) for one in inputs]
    return [one.rollout_id for one in await store.enqueue_many_rollouts(requests)]


async def taken(store: LightningStore, worker_id: str | None = None) -> AttemptedRollout:
    found = await store.dequeue_rollout(worker_id)
    assert found is not None
    return found


async def end_ok(store: LightningStore, attempt: AttemptedRollout, reward: float = 1.0) -> Attempt:
    return await store.end_attempt(*key_of(attempt), EndReason.OK, reward=reward)


async def status_of(store: LightningStore, rollout_id: str) -> str:
    found = await store.get_rollout_by_id(rollout_id)
    assert found is not None
    return found.status.value


async def until(true: Callable[[], Awaitable[bool]], seconds: float = 20.0) -> None:
    """Until the condition holds; for what the store does by itself and tells nobody."""
    loop = asyncio.get_running_loop()
    give_up = loop.time() + seconds
    while not await true():
        assert loop.time() < give_up, "it did not come to pass"
        await asyncio.sleep(0.02)
