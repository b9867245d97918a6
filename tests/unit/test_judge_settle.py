"""An attempt that is judged ends with the verdict as its reward, or without a reward and with a reason."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agl_ray.agents import Outcome
from agl_ray.judge import Case, JudgeFailed, Verdict, judged
from agl_ray.store import LightningStore, StoreCore
from agl_ray.tracing import SpanRecorder
from agl_ray.types import EndReason


class Judges:
    """Gives what it was made with."""

    def __init__(self, said: Any) -> None:
        self.said, self.cases = said, []  # type: ignore[var-annotated]

    async def verdict(self, case: Case) -> Verdict:
        self.cases.append(case)
        if isinstance(self.said, Exception):
            raise self.said
        if self.said is None:
            await asyncio.sleep(30)
        return self.said


def settle(said: Any, outcome: Outcome, seconds: float = 5.0) -> tuple[Outcome, list[Any], Judges]:
    judges = Judges(said)

    async def main() -> tuple[Outcome, list[Any]]:
        core = await StoreCore.open("memory://")
        store = LightningStore.local(core)
        attempt = await store.start_rollout({"q": 1})
        recorder = SpanRecorder(attempt.rollout_id, attempt.attempt_id)
        found = await judged(judges, store, attempt, outcome, recorder, seconds)
        await core.close()
        return found, recorder.close()

    return (*asyncio.run(main()), judges)


OK = Outcome(reason=EndReason.OK, reward=0.25)


def test_the_verdict_is_the_reward_and_its_parts_are_recorded() -> None:
    verdict = Verdict(
        reward=0.75,
        dimensions={"style": 0.5},
        calls={"c1": 1.0},
        tags={"search": 0.5},
        comment="good",
    )
    outcome, rows, judges = settle(verdict, OK)
    assert outcome == Outcome(reason=EndReason.OK, reward=0.75)
    assert (judges.cases[0].task, judges.cases[0].reward) == ({"q": 1}, 0.25)
    call, tag, whole = rows
    assert (call["reward"], call["reward_target"]) == (1.0, "c1")
    assert (tag["reward"], tag["reward_target"]) == (0.5, "tag:search")
    assert (whole["reward"], whole["reward_dimension"], whole["reward_target"]) == (
        0.75,
        "primary",
        None,
    )
    assert whole["attributes"]["agl.judge.comment"] == "good"
    assert whole["attributes"]["agentlightning.reward.1.name"] == "style"


@pytest.mark.parametrize(
    ("said", "seconds", "reason", "text"),
    [
        (JudgeFailed("status 401"), 5.0, EndReason.ENV_ERROR, "status 401"),
        (None, 0.05, EndReason.TIMEOUT, "deadline passed 0.05 s after its agent had ended"),
        (None, -1.0, EndReason.TIMEOUT, "deadline passed"),
    ],
)
def test_no_verdict_is_no_reward(said: Any, seconds: float, reason: EndReason, text: str) -> None:
    outcome, rows, _ = settle(said, OK, seconds)
    assert (outcome.reason, outcome.reward, rows) == (reason, None, [])
    assert text in (outcome.error or "")


def test_an_attempt_that_failed_is_not_judged() -> None:
    failed = Outcome(reason=EndReason.AGENT_ERROR, error="no")
    outcome, rows, judges = settle(Verdict(reward=1.0), failed)
    assert (outcome, rows, judges.cases) == (failed, [], [])
