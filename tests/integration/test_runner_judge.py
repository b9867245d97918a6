"""A judge as a real Ray actor beside real runners: its verdicts are the rewards, its failures are end reasons, its death is survived."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from test_runner_pool import AGENTS, config, store, with_pool

from actors.judge import JudgePool
from agl_ray.config.judge import JudgeConfig
from agl_ray.judge import Case
from agl_ray.store import LightningStore
from agl_ray.types import EndReason, InputError, new_id

pytestmark = pytest.mark.slow

__all__ = ["store"]  # a fixture


def test_verdicts_are_rewards_and_failures_are_end_reasons(
    store: LightningStore, tmp_path: Path
) -> None:
    rows: list[Any] = [{"score": number / 4} for number in range(4)]
    rows += [{"score": 0.75}, {"score": 1.0, "judge": "raises"}]
    rows += [{"score": 0.5, "die_once": str(tmp_path / "died")}]

    async def scenario() -> None:
        judge = JudgeConfig(function=f"{AGENTS}:judge_of_rows", retries=1, timeout_seconds=60)
        runners = config().runners.model_copy(update={"num_runners": 1, "concurrency": 8})
        settings = config(max_attempts=1).model_copy(update={"judge": judge, "runners": runners})
        evaluation, _ = await with_pool(
            settings,
            store,
            "gives_nothing",
            rows,
            lambda groups: groups.evaluate(rows, 0, lambda n: None),
        )
        assert sorted(evaluation.scores) == [0.0, 0.25, 0.5, 0.5, 0.75, 0.75]
        for rollout in (await store.query_rollouts(limit=-1)).items:
            (attempt,) = (await store.query_attempts(rollout.rollout_id)).items
            spans = await store.query_span_rows(rollout.rollout_id, attempt.attempt_id)
            if rollout.input.get("judge") == "raises":
                assert (attempt.end_reason, attempt.reward) == (EndReason.ENV_ERROR, None)
                assert "LookupError: no such rubric" in str(attempt.error)
                assert "failed 2 times" in str(attempt.error)
                assert spans == []
            else:
                assert (attempt.end_reason, attempt.reward) == (
                    EndReason.OK,
                    rollout.input["score"],
                )
                assert [one["reward"] for one in spans] == [attempt.reward]
                assert spans[0]["attributes"]["agl.judge.comment"] == "fine"

    asyncio.run(scenario())


def test_a_pool_asks_the_same_content_once_and_says_what_is_wrong_at_the_start(
    ray_cluster: None,
) -> None:
    def pool(**options: Any) -> JudgePool:
        settings = JudgeConfig(**options)
        return JudgePool(settings, base=str(AGENTS.parent), namespace=new_id("judges"))

    async def scenario() -> None:
        judges = pool(function=f"{AGENTS.name}:judge_of_rows", num_judges=2)
        await judges.start()
        cases = [
            Case(task={"score": n % 5 / 4}, mode=None, reward=None, calls=[]) for n in range(50)
        ]
        verdicts = await asyncio.gather(*(judges.client.verdict(one) for one in cases))
        assert [one.reward for one in verdicts] == [n % 5 / 4 for n in range(50)]
        counts = await judges.statistics()
        assert sum(one["asked"] for one in counts) == 5
        assert sum(one["remembered"] for one in counts) == 45
        judges.stop()
        nobody = pool(function=f"{AGENTS.name}:nobody")
        with pytest.raises(InputError, match="has no 'nobody'"):
            await nobody.start()
        nobody.stop()

    asyncio.run(scenario())
