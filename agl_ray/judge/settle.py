"""The end of an attempt that is judged: from its calls to a verdict, to reward spans and an end reason.

Who calls it: the runner, when an agent has ended well. Test alone: tests/unit/test_judge_settle.py.
"""

from __future__ import annotations

from typing import Protocol

from agl_ray.agents import Outcome
from agl_ray.judge.bench import JudgeFailed
from agl_ray.judge.case import Case, Verdict, case_of
from agl_ray.store import LightningStore
from agl_ray.store.doors.facade_events import last_reward
from agl_ray.tracing import SpanRecorder, emit_reward, recording
from agl_ray.types import AttemptedRollout, EndReason, WaitTimeout
from agl_ray.waits import wait

PRIMARY = "primary"  # as every reward that is one number
COMMENT = "agl.judge.comment"


class Judges(Protocol):
    """Whoever gives verdicts; JudgeFailed where there is none."""

    async def verdict(self, case: Case) -> Verdict: ...


async def judged(
    judges: Judges,
    store: LightningStore,
    attempt: AttemptedRollout,
    outcome: Outcome,
    recorder: SpanRecorder,
    seconds: float,
) -> Outcome:
    """The outcome of an attempt whose agent ended with `outcome`, OK with or without a reward of its own.

    OK with the verdict as its reward, recorded as reward spans; else `env_error`, or `timeout` where the `seconds` that are left of the attempt's
    deadline ran out. Never a reward without a verdict.
    """
    if outcome.reason is not EndReason.OK:
        return outcome
    rows = await store.query_span_rows(attempt.rollout_id, attempt.attempt_id)
    # Else the one that a program of the agent's posted over HTTP.
    given = last_reward(rows) if outcome.reward is None else outcome.reward
    case = case_of(attempt.rollout, rows, given)
    try:
        verdict = await wait(judges.verdict(case), on="the judge's verdict", seconds=seconds)
    except WaitTimeout:
        text = f"the attempt's deadline passed {seconds:.3g} s after its agent had ended, while the judge was asked"
        return Outcome(reason=EndReason.TIMEOUT, error=text)
    except JudgeFailed as error:
        return Outcome(reason=EndReason.ENV_ERROR, error=str(error))
    with recording(recorder):
        _record(verdict)
    return Outcome(reason=EndReason.OK, reward=verdict.reward)


def _record(verdict: Verdict) -> None:
    for call_id, reward in verdict.calls.items():
        emit_reward({PRIMARY: reward}, primary_key=PRIMARY, call_id=call_id)
    for tag, reward in verdict.tags.items():
        emit_reward({PRIMARY: reward}, primary_key=PRIMARY, tag=tag)
    # Last, and without a target: the rollout's.
    dimensions = {**verdict.dimensions, PRIMARY: verdict.reward}
    comment = {COMMENT: verdict.comment} if verdict.comment else None
    emit_reward(dimensions, primary_key=PRIMARY, attributes=comment)
