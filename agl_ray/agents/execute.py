"""Run an agent on one attempt: a coroutine, or a thread for a plain function, under a deadline.

Called by the runner actor; a unit test calls it without Ray. What comes out is an `Outcome`: an end reason and, only for
`ok`, a reward. A failure is never a reward (contract 1).
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import traceback
from typing import Any

from agl_ray.agents.agent import EnvironmentFailure, FunctionAgent, LitAgent, RolloutContext
from agl_ray.tracing import SpanRecorder, finite_reward, recording
from agl_ray.types import (
    LLM,
    AttemptedRollout,
    EndReason,
    EngineError,
    NamedResources,
    Record,
    replace,
)


class Outcome(Record, frozen=True):
    """How an attempt ended. `reward` is None unless `reason` is OK; `error` is a paragraph for people."""

    reason: EndReason
    reward: float | None = None
    error: str | None = None


def resources_for(attempt: AttemptedRollout, resources: NamedResources) -> NamedResources:
    """The resources as this attempt sees them: every LLM of our gateway points at the attempt's own URL."""
    return {
        name: replace(
            resource,
            endpoint=resource.get_base_url(attempt.rollout_id, attempt.attempt_id),
            api_key=resource.api_key or "agl-ray",  # OpenAI clients refuse to start without one
            gateway=False,
        )
        if isinstance(resource, LLM)
        else resource
        for name, resource in resources.items()
    }


def context_of(attempt: AttemptedRollout, timeout_seconds: float) -> RolloutContext:
    """The context object of an attempt; step and group index come from the rollout's metadata."""
    metadata = attempt.rollout.metadata
    return RolloutContext(
        rollout_id=attempt.rollout_id,
        attempt_id=attempt.attempt_id,
        mode=attempt.rollout.mode,
        step=metadata.get("step"),
        group_index=metadata.get("group_index"),
        attempt_number=attempt.attempt.sequence_id,
        timeout_seconds=timeout_seconds,
    )


async def run_agent(
    agent: LitAgent,
    attempt: AttemptedRollout,
    resources: NamedResources,
    recorder: SpanRecorder,
    timeout_seconds: float,
) -> Outcome:
    """Run `agent` on the attempt's input for at most `timeout_seconds` and say how it ended; never raises for the
    agent's faults. A plain function that overruns cannot be stopped inside its thread: it is left behind, and the
    gateway refuses its later calls because the attempt has ended."""
    ctx = context_of(attempt, timeout_seconds)
    try:
        with recording(recorder):
            value = await asyncio.wait_for(
                _call(agent, attempt, resources_for(attempt, resources), ctx), timeout_seconds
            )
    except TimeoutError:
        return Outcome(
            reason=EndReason.TIMEOUT, error=f"the agent ran longer than {timeout_seconds:g} s"
        )
    except asyncio.CancelledError:
        raise
    except EnvironmentFailure as error:
        return Outcome(reason=EndReason.ENV_ERROR, error=_describe(error))
    except EngineError as error:
        return Outcome(reason=EndReason.ENGINE_ERROR, error=_describe(error))
    except Exception as error:  # noqa: BLE001  the agent's code may raise anything
        unanswered = _is_unanswered_call(error, attempt)
        reason = EndReason.ENGINE_ERROR if unanswered else EndReason.AGENT_ERROR
        return Outcome(reason=reason, error=_describe(error))
    return _judge(value, recorder)


def _judge(value: Any, recorder: SpanRecorder) -> Outcome:
    """The outcome of an agent that returned `value`."""
    if value is None:
        value = recorder.last_reward()
        if value is None:
            return Outcome(
                reason=EndReason.AGENT_ERROR,
                error="the agent returned None and emitted no reward: return a number or call agl.emit_reward",
            )
        return Outcome(reason=EndReason.OK, reward=value)
    try:
        reward = finite_reward(value)
    except ValueError:
        return Outcome(
            reason=EndReason.AGENT_ERROR,
            error=f"the agent returned {value!r} as its reward: expected a finite number or None",
        )
    return Outcome(reason=EndReason.OK, reward=reward)


async def _call(
    agent: LitAgent, attempt: AttemptedRollout, resources: NamedResources, ctx: RolloutContext
) -> Any:
    rollout = attempt.rollout
    if isinstance(agent, FunctionAgent):
        function: Any = agent.function
        kwargs = agent.arguments(rollout.input, resources, rollout, ctx)
    else:
        function = copy.copy(agent).method_for(rollout.mode)
        kwargs = {"task": rollout.input, "resources": resources, "rollout": rollout}
    try:
        if inspect.iscoroutinefunction(function):
            return await function(**kwargs)
        return await asyncio.to_thread(function, **kwargs)
    except SystemExit as error:  # asyncio would end the whole runner with it
        raise RuntimeError(f"the agent called sys.exit({error.code})") from error


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
