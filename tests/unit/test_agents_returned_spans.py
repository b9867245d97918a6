"""Agents that return spans: recorded into the attempt once, the reward taken from them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

import agl_ray as agl
from agl_ray.agents import Outcome, run_agent, settled
from agl_ray.tracing import SpanRecorder, follow
from agl_ray.types import Attempt, AttemptedRollout, EndReason, Rollout, Span

REWARD = {"agentlightning.reward.0.name": "primary", "agentlightning.reward.0.value": 0.5}
OWN = {"rollout_id": "ro-1", "attempt_id": "at-1"}


def run(make: Any) -> tuple[Outcome, dict[str, dict[str, Any]]]:
    """How an agent ended that returns what `make` gives, and its spans by name."""

    class Agent(agl.LitAgent[int]):
        def rollout(self, task: int, resources: agl.NamedResources, rollout: agl.Rollout) -> Any:
            return make()

    attempt = AttemptedRollout(
        rollout=Rollout(rollout_id="ro-1", input=1, start_time=0.0),
        attempt=Attempt(**OWN, sequence_id=1, start_time=0.0),
    )
    recorder = SpanRecorder("ro-1", "at-1")
    outcome = asyncio.run(run_agent(Agent(), attempt, {}, recorder, 5.0))
    rows = recorder.close()
    assert len({row["span_id"] for row in rows}) == len(rows)
    return settled(outcome), {row["name"]: row for row in rows}


def test_spans_of_a_provider_of_the_agents_own() -> None:
    def make() -> list[Any]:
        tracer = TracerProvider().get_tracer("own")  # nobody watches it
        with tracer.start_as_current_span("search", attributes={"hits": 3}) as search:
            pass
        with tracer.start_as_current_span("judge", attributes=REWARD) as judge:
            pass
        return [search, judge]

    outcome, rows = run(make)
    assert outcome == Outcome(reason=EndReason.OK, reward=0.5)
    assert rows["search"]["attributes"]["hits"] == 3
    assert rows["search"]["parent_id"] is None
    assert (rows["judge"]["kind"], rows["judge"]["reward"]) == ("reward", 0.5)


def test_what_was_recorded_by_itself_is_not_recorded_twice() -> None:
    follow()

    def make() -> list[Any]:
        with trace.get_tracer("global").start_as_current_span("search") as search:
            pass
        agl.emit_reward(0.25)
        return [search, search]

    outcome, rows = run(make)
    assert outcome.reward == 0.25
    assert [*rows] == ["search", "agentlightning.annotation"]


def test_records_and_dictionaries_with_the_last_reward_of_the_rollout() -> None:
    def make() -> list[Any]:
        return [
            Span(**OWN, name="first", kind="reward", extra={"reward": 1.0}),
            {"name": "second", "attributes": REWARD, "start_time": 5.0, "end_time": 6.5},
            Span(
                **OWN, name="part", kind="reward", extra={"reward": 9.0, "reward_target": "tag:x"}
            ),
            {"name": "bare"},
        ]

    outcome, rows = run(make)
    assert outcome.reward == 0.5
    assert rows["second"]["end_ns"] - rows["second"]["start_ns"] == 1_500_000_000
    assert len({row["trace_id"] for row in rows.values()}) == 1
    assert rows["bare"]["span_id"]


def test_an_empty_list_is_as_none() -> None:
    outcome, rows = run(list)
    assert (outcome.reason, rows) == (EndReason.AGENT_ERROR, {})
    assert "no reward was emitted" in (outcome.error or "")


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (object(), "number 1 is none: expected a span of OpenTelemetry's SDK"),
        ({"attributes": {}}, "number 1 is none: Object missing required field `name`"),
        ({"name": "a", "attributes": {"x": object()}}, "number 1 is none"),
        ({"name": "a", "extra": {"prompt_ids": "abc"}}, "number 1 is none"),
        ({"name": "a", "status": "good"}, "expected one of ['UNSET', 'OK', 'ERROR'], got 'good'"),
        ({"name": "a", "rollout_id": "ro-2"}, "has the rollout_id 'ro-2': expected its own"),
        ({"name": "a", "attributes": {"agentlightning.reward.0.value": "high"}}, "finite number"),
    ],
)
def test_what_is_no_span_is_an_agent_error_and_nothing_is_recorded(bad: Any, error: str) -> None:
    outcome, rows = run(lambda: [{"name": "good"}, bad])
    assert (outcome.reason, outcome.reward, rows) == (EndReason.AGENT_ERROR, None, {})
    assert error in (outcome.error or "")


def test_a_span_that_has_not_ended_is_an_agent_error() -> None:
    outcome, _ = run(lambda: [TracerProvider().get_tracer("own").start_span("open")])
    assert "expected one that has ended" in (outcome.error or "")
