"""OpenTelemetry in runners that are real Ray actors, over the real store: every attempt has its own spans, all of them, and no others."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from test_runner_pool import config, store, with_pool

from agl_ray.store import LightningStore
from agl_ray.types import Attempt, EndReason

__all__ = ["store"]  # a fixture

SPANS = Counter({"agent": 1, "thread": 1, "pool": 3, "task": 3, "to_thread": 3, "left open": 1})
SPANS["agentlightning.annotation"] = 1  # the reward


def test_rollouts_at_once_each_have_exactly_their_own_spans(store: LightningStore) -> None:
    """Sixteen in one process, and one that loses a span: it does not end ok."""
    rows: list[Any] = [{"row": number, "spoil": number == 16} for number in range(17)]

    async def scenario() -> None:
        runners = config().runners.model_copy(update={"num_runners": 1, "concurrency": 17})
        settings = config(max_attempts=1).model_copy(update={"runners": runners})
        evaluation, notices = await with_pool(
            settings, store, "traced", rows, lambda groups: groups.evaluate(rows, 0, lambda n: None)
        )
        assert (sorted(evaluation.scores), notices) == ([float(n) for n in range(16)], [])
        for rollout in (await store.query_rollouts(limit=-1)).items:
            attempts = (await store.query_attempts(rollout.rollout_id)).items
            if rollout.input["spoil"]:
                assert {(one.end_reason, one.reward) for one in attempts} == {
                    (EndReason.LOST, None)
                }
                assert "1 of the attempt's 14 spans were lost: spoiled" in str(attempts[0].error)
            else:
                await check(rollout.input["row"], *attempts)

    async def check(row: int, attempt: Attempt) -> None:
        spans = await store.query_span_rows(attempt.rollout_id, attempt.attempt_id)
        assert Counter(one["name"] for one in spans) == SPANS
        assert attempt.num_spans == len(spans)
        assert {one["attributes"].get("row", str(row)) for one in spans} == {str(row)}
        by_id = {one["span_id"]: one for one in spans}
        above = {"task": "agent", "thread": "agent", "pool": "agent", "to_thread": "task"}
        for one in spans:
            parent = by_id[one["parent_id"]]["name"] if one["parent_id"] else None
            assert parent == above.get(one["name"])
            assert one["trace_id"] == spans[0]["trace_id"]
            assert one["attributes"].get("agl.unfinished", False) is (one["name"] == "left open")

    asyncio.run(scenario())
