"""Hooks: a user's code around every rollout, in the process that runs the agent.

    on_rollout_start   before anything else of the rollout
    on_trace_start     the rollout's spans are being recorded from here on: emitters work
    (the agent)
    on_trace_end       the agent has returned, emitters still work; not after an exception
    on_rollout_end     always, with the spans that this process has recorded; not where the process was ended (isolation process, deadline)

Given as `Trainer(config, hooks=[...])`. A hook's method may be a coroutine or plain. Its error ends the attempt as an error of
the agent would, unlike in agent-lightning 0.3, which hides it. Called by `agl_ray.agents.execute`. Test alone: tests/unit/test_agents_hooks.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agl_ray.agents.agent import LitAgent, RolloutContext
from agl_ray.agents.calling import call
from agl_ray.agents.outcome import Outcome
from agl_ray.spans.objects import SAME, span_object
from agl_ray.tracing import SpanRecorder
from agl_ray.types import AttemptedRollout, InputError, Span


@dataclass
class HookRunner:
    """What hooks get as `runner`. outcome: how the attempt ended, from the agent's end on."""

    worker_id: str
    ctx: RolloutContext
    outcome: Outcome | None = None

    def get_worker_id(self) -> str:
        return self.worker_id


class Hook:
    """Override what is needed; the names and parameters are agent-lightning 0.3's.

    agent: the object that runs this rollout. tracer: records its spans (`agl_ray.tracing.SpanRecorder`). rollout: the rollout with its attempt.
    """

    async def on_rollout_start(
        self, *, agent: LitAgent, runner: HookRunner, rollout: AttemptedRollout
    ) -> None:
        """Before anything else of the rollout."""

    async def on_trace_start(
        self,
        *,
        agent: LitAgent,
        runner: HookRunner,
        tracer: SpanRecorder,
        rollout: AttemptedRollout,
    ) -> None:
        """Spans are being recorded: emitters work."""

    async def on_trace_end(
        self,
        *,
        agent: LitAgent,
        runner: HookRunner,
        tracer: SpanRecorder,
        rollout: AttemptedRollout,
    ) -> None:
        """The agent has returned, emitters still work."""

    async def on_rollout_end(
        self,
        *,
        agent: LitAgent,
        runner: HookRunner,
        rollout: AttemptedRollout,
        spans: list[Span],
    ) -> None:
        """The rollout is over; `runner.outcome` says how."""


def check_hooks(hooks: Sequence[Any]) -> tuple[Hook, ...]:
    """`hooks`; InputError where one is not a Hook."""
    for hook in hooks:
        if not isinstance(hook, Hook):
            raise InputError(f"hooks: expected objects of agl_ray.Hook, got {hook!r:.200}")
    return tuple(hooks)


class Hooks:
    """The hooks of one attempt, in the order given, then the agent's own two. apart: plain methods run in a thread."""

    def __init__(
        self,
        hooks: Sequence[Hook],
        agent: LitAgent,
        runner: HookRunner,
        rollout: AttemptedRollout,
        tracer: SpanRecorder,
        *,
        apart: bool,
    ) -> None:
        self._hooks, self._apart, self.runner = hooks, apart, runner
        self._agent, self._rollout, self._tracer = agent, rollout, tracer

    async def rollout_start(self) -> None:
        await self._fire("on_rollout_start")
        await self._own(
            "on_rollout_start", task=self._rollout, runner=self.runner, tracer=self._tracer
        )

    async def trace_start(self) -> None:
        await self._fire("on_trace_start", tracer=self._tracer)

    async def trace_end(self) -> None:
        await self._fire("on_trace_end", tracer=self._tracer)

    async def rollout_end(self, outcome: Outcome) -> None:
        self.runner.outcome = outcome
        if self._hooks:
            spans = [_span(row) for row in self._tracer.rows()]
            await self._fire("on_rollout_end", spans=spans)
        await self._own(
            "on_rollout_end",
            task=self._rollout,
            rollout=self._rollout,
            runner=self.runner,
            tracer=self._tracer,
        )

    async def _fire(self, name: str, **more: Any) -> None:
        for hook in self._hooks:
            given = {"agent": self._agent, "runner": self.runner, "rollout": self._rollout, **more}
            await call(getattr(hook, name), given, apart=self._apart)

    async def _own(self, name: str, **given: Any) -> None:
        if getattr(type(self._agent), name) is not getattr(LitAgent, name):
            await call(getattr(self._agent, name), given, apart=self._apart)


def _span(row: dict[str, Any]) -> Span:
    return span_object({**dict.fromkeys(SAME), **row})
