"""From recorder to store: many spans travel while the attempt runs, and what the store refuses is counted."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

from agl_ray.store import LightningStore, StoreCore
from agl_ray.tracing import SpanRecorder, SpanSender
from agl_ray.tracing.recorder import MANY
from agl_ray.types import EndReason


def with_store(scenario: Callable[[LightningStore, StoreCore], Awaitable[Any]]) -> None:
    async def main() -> None:
        core = await StoreCore.open("memory://")
        try:
            await scenario(LightningStore.local(core), core)
        finally:
            await core.close()

    asyncio.run(main())


def test_many_spans_are_sent_while_threads_make_more() -> None:
    async def scenario(store: LightningStore, core: StoreCore) -> None:
        begun = await store.start_rollout({})
        key = begun.rollout_id, begun.attempt_id
        recorder = SpanRecorder(*key)
        sender = SpanSender(store, recorder)

        def work() -> None:
            for _ in range(MANY):
                recorder.add(name="n", kind="span")

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            await asyncio.to_thread(thread.join)
        await asyncio.sleep(0)
        sent_before = 8 * MANY - recorder.waiting
        spans, batch_id = await sender.close()
        assert sent_before >= MANY
        ended = await store.end_attempt(
            *key,
            EndReason.OK,
            reward=1.0,
            expected_spans=recorder.num_spans,
            spans=spans,
            batch_id=batch_id,
        )
        assert (ended.num_spans, ended.end_reason) == (8 * MANY, EndReason.OK)
        assert recorder.why_lost() is None

    with_store(scenario)


def test_what_the_store_refuses_is_lost_and_counted() -> None:
    async def scenario(store: LightningStore, core: StoreCore) -> None:
        recorder = SpanRecorder("ro-unknown", "at-unknown")
        sender = SpanSender(store, recorder)
        for _ in range(MANY):
            recorder.add(name="n", kind="span")
        for _ in range(3):  # until the sender has taken them
            await asyncio.sleep(0)
        assert recorder.waiting == 0
        await sender.close()
        assert recorder.lost.total() == MANY
        assert "NotFound" in (recorder.why_lost() or "")

    with_store(scenario)


def test_few_spans_are_left_for_the_end() -> None:
    async def scenario(store: LightningStore, core: StoreCore) -> None:
        recorder = SpanRecorder("ro-unknown", "at-unknown")
        sender = SpanSender(store, recorder)
        recorder.add(name="n", kind="span")
        spans, batch_id = await sender.close()
        assert spans is not None
        assert (spans.num_rows, spans["name"][0].as_py()) == (1, "n")
        assert batch_id == "at-unknown-1"
        assert (await SpanSender(store, SpanRecorder("ro-b", "at-b")).close())[0] is None

    with_store(scenario)


def test_what_is_sent_is_not_sent_in_the_context_of_who_recorded() -> None:
    """It outlives the agent: what belongs to the agent's context ends with it."""
    mark: ContextVar[str] = ContextVar("mark", default="")
    seen: list[str] = []

    async def scenario(store: LightningStore, core: StoreCore) -> None:
        begun = await store.start_rollout({})
        key = begun.rollout_id, begun.attempt_id
        recorder = SpanRecorder(*key)
        sender = SpanSender(store, recorder)
        sent, sending = sender._send, asyncio.Event()

        async def send(rows: list[dict[str, Any]]) -> None:
            seen.append(mark.get())
            sending.set()
            await sent(rows)

        sender._send = send  # type: ignore[method-assign]
        mark.set("the agent's")
        for _ in range(MANY):
            recorder.add(name="n", kind="span")
        await asyncio.wait_for(sending.wait(), 60)
        await sender.close()

    with_store(scenario)
    assert seen == [""]
