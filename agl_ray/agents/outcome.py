"""How an attempt ended, in the words of the store: from what an agent returned, or from what it raised.

Called by `agl_ray.agents.execute` and `agl_ray.agents.processes`. A failure is never a reward (contract 1). Test alone:
tests/unit/test_agents_execute.py.
"""

from __future__ import annotations

import traceback
from typing import Any

from agl_ray.agents.agent import EnvironmentFailure
from agl_ray.agents.returned_spans import record_returned
from agl_ray.tracing import SpanRecorder, finite_reward
from agl_ray.types import AttemptedRollout, EndReason, EngineError, InputError, Record

NO_REWARD = (
    "the agent returned None and no reward was emitted or posted for its attempt: return a number or call "
    "agl.emit_reward"
)


class Outcome(Record, frozen=True):
    """How an attempt ended. `reward` is None unless `reason` is OK; `error` is a paragraph for people.

    OK without a reward: the agent ended well and gave none itself; somebody else may have posted one (`settled`).
    """

    reason: EndReason
    reward: float | None = None
    error: str | None = None


def returned(value: Any, recorder: SpanRecorder) -> Outcome:
    """The outcome of an agent that returned `value`: its reward, spans (`returned_spans`), or None. Without a reward the last one that it
    emitted counts."""
    if value is None:
        return Outcome(reason=EndReason.OK, reward=recorder.last_reward())
    if isinstance(value, list) and not any(isinstance(one, int | float | str) for one in value):
        try:
            reward = record_returned(value, recorder)
        except InputError as error:
            return Outcome(reason=EndReason.AGENT_ERROR, error=str(error))
        last = recorder.last_reward() if reward is None else reward
        return Outcome(reason=EndReason.OK, reward=last)
    try:
        return Outcome(reason=EndReason.OK, reward=finite_reward(value))
    except ValueError:
        text = f"the agent returned {value!r:.500} as its reward: expected a finite number, a list of spans, or None"
        return Outcome(reason=EndReason.AGENT_ERROR, error=text)


def raised(error: BaseException, attempt: AttemptedRollout) -> Outcome:
    """The outcome of an agent that raised `error`."""
    if isinstance(error, EnvironmentFailure):
        reason = EndReason.ENV_ERROR
    elif isinstance(error, EngineError) or _is_unanswered_call(error, attempt):
        reason = EndReason.ENGINE_ERROR
    else:
        reason = EndReason.AGENT_ERROR
    return Outcome(reason=reason, error=_describe(error))


def settled(outcome: Outcome, posted: float | None = None) -> Outcome:
    """`outcome` with its reward: the agent's own, else the one that was `posted` for its attempt; without either it is an agent error."""
    if outcome.reason is not EndReason.OK or outcome.reward is not None:
        return outcome
    if posted is None:
        return Outcome(reason=EndReason.AGENT_ERROR, error=NO_REWARD)
    return Outcome(reason=EndReason.OK, reward=posted)


def _is_unanswered_call(error: BaseException, attempt: AttemptedRollout) -> bool:
    """Whether the agent failed because a call to its model got no answer: an HTTP client's exception about this attempt's own URL
    (httpx, and what OpenAI's and Anthropic's clients make of it) without a status, or with one of 500 and above."""
    own = f"/rollout/{attempt.rollout_id}/attempt/{attempt.attempt_id}/"
    link: BaseException | None = error
    while link is not None:
        if own in _url(link):
            status = getattr(link, "status_code", None)
            return status is None or int(status) >= 500
        link = link.__cause__ or link.__context__
    return False


def _url(error: BaseException) -> str:
    try:
        return str(getattr(getattr(error, "request", None), "url", ""))
    except RuntimeError:  # httpx raises it where an exception was made without a request
        return ""


def _describe(error: BaseException) -> str:
    """One paragraph: the exception, and the last line of the user's code that was on the stack."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        frame for frame in frames if "agl_ray" not in frame.filename.replace("\\", "/").split("/")
    ]
    user = [frame for frame in own if "site-packages" not in frame.filename] or frames
    where = f" (at {user[-1].filename}:{user[-1].lineno} in {user[-1].name})" if user else ""
    return f"{type(error).__name__}: {error}{where}"
