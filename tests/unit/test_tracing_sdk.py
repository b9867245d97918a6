"""Spans of the OpenTelemetry SDK become spans of the attempt that they belong to, or the attempt says that they were lost."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import set_span_in_context

import agl_ray as agl
from agl_ray.spans import span_batch
from agl_ray.tracing import SpanRecorder, recording
from agl_ray.tracing.sdk import RecorderProcessor


@pytest.fixture
def tracer() -> trace.Tracer:
    """Of a provider that has our processor, as `install` gives it to the global one."""
    provider = TracerProvider()
    provider.add_span_processor(RecorderProcessor())
    return provider.get_tracer("agent", "1")


def close(recorder: SpanRecorder) -> dict[str, dict[str, Any]]:
    rows = recorder.close()
    span_batch(rows)
    return {row["name"]: row for row in rows}


def test_sdk_spans_emitters_and_operations_are_one_tree(tracer: trace.Tracer) -> None:
    recorder = SpanRecorder("ro-1", "at-1")
    with (
        recording(recorder),
        tracer.start_as_current_span("top", attributes={"gen_ai.request.model": "m"}),
        agl.operation(),
        tracer.start_as_current_span("inner") as inner,
    ):
        inner.add_event("tick")
        agl.emit_message("hi")
    rows = close(recorder)
    assert {row["rollout_id"] for row in rows.values()} == {"ro-1"}
    assert {row["trace_id"] for row in rows.values()} == {f"{recorder.root.trace_id:032x}"}
    assert (rows["top"]["parent_id"], rows["top"]["model"]) == (None, "m")
    assert rows["agentlightning.operation"]["parent_id"] == rows["top"]["span_id"]
    assert rows["inner"]["parent_id"] == rows["agentlightning.operation"]["span_id"]
    assert rows["agentlightning.message"]["parent_id"] == rows["inner"]["span_id"]
    assert rows["inner"]["attributes"]["otel.scope.name"] == "agent"
    assert recorder.num_spans == 4


def test_spans_outside_of_a_rollout_are_left_alone(tracer: trace.Tracer) -> None:
    with tracer.start_as_current_span("outside"):
        recorder = SpanRecorder("ro-1", "at-1")
        with recording(recorder), tracer.start_as_current_span("inside"):
            pass
    assert [*close(recorder)] == ["inside"]


def test_rollouts_at_once_do_not_mix(tracer: trace.Tracer) -> None:
    async def rollout(number: int) -> SpanRecorder:
        recorder = SpanRecorder("ro", f"at-{number}")
        with recording(recorder):
            for step in range(5):
                with tracer.start_as_current_span(f"{number}.{step}"):
                    await asyncio.sleep(0)
                    await asyncio.gather(*(child(f"{number}.{step}.{n}") for n in range(3)))
        return recorder

    async def child(name: str) -> None:
        with tracer.start_as_current_span(name):
            await asyncio.sleep(0)

    async def main() -> list[SpanRecorder]:
        return list(await asyncio.gather(*(rollout(number) for number in range(8))))

    for number, recorder in enumerate(asyncio.run(main())):
        rows = close(recorder)
        assert len(rows) == 20
        for name, row in rows.items():
            owner, _, _ = name.partition(".")
            assert (int(owner), row["attempt_id"]) == (number, f"at-{number}")
            above = name.rpartition(".")[0]
            assert row["parent_id"] == (rows[above]["span_id"] if "." in above else None)


def test_a_parent_kept_by_hand_and_a_trace_of_its_own_find_their_attempt(
    tracer: trace.Tracer,
) -> None:
    """As callback handlers do, which keep spans by run id, and instrumentors that begin a new trace for a conversation."""
    recorder, other = SpanRecorder("ro-1", "at-1"), SpanRecorder("ro-2", "at-2")
    with recording(recorder):
        kept = tracer.start_span("kept")
        apart = tracer.start_span("apart", context=Context())
    with recording(other):
        tracer.start_span("by hand", context=set_span_in_context(kept, Context())).end()
        tracer.start_span("apart too", context=set_span_in_context(apart, Context())).end()
    tracer.start_span("nowhere", context=set_span_in_context(kept, Context())).end()
    apart.end()
    kept.end()
    rows = close(recorder)
    assert {*rows} == {"kept", "apart", "by hand", "apart too", "nowhere"}
    assert rows["apart too"]["parent_id"] == rows["apart"]["span_id"]
    assert rows["apart"]["parent_id"] is None
    assert close(other) == {}


def test_a_span_that_is_open_at_the_end_is_recorded_once(tracer: trace.Tracer) -> None:
    recorder = SpanRecorder("ro-1", "at-1")
    with recording(recorder):
        span = tracer.start_span("stream", attributes={"n": 1})
        row = close(recorder)["stream"]
    span.end()
    assert row["attributes"]["agl.unfinished"] is True
    assert row["attributes"]["n"] == 1
    assert (recorder.num_spans, recorder.take(), recorder.why_lost()) == (1, [], None)


def test_a_span_that_begins_after_the_end_is_told(
    tracer: trace.Tracer, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = SpanRecorder("ro-1", "at-1")
    with recording(recorder), caplog.at_level(logging.WARNING, "agl_ray.tracing"):
        close(recorder)
        for _ in range(3):
            with tracer.start_as_current_span("late"):
                pass
    assert (recorder.late, recorder.take()) == (3, [])
    assert len(caplog.records) == 1
    assert "attempt at-1" in caplog.text


def test_a_span_that_cannot_be_recorded_is_lost_and_its_maker_is_not_harmed(
    tracer: trace.Tracer,
) -> None:
    recorder = SpanRecorder("ro-1", "at-1")
    with recording(recorder):
        with tracer.start_as_current_span("bad") as span:
            span.set_attribute("agentlightning.reward.0.value", "high")
        left_open = tracer.start_span("bad too")
        left_open.set_attribute("agentlightning.reward.0.value", float("nan"))
        with tracer.start_as_current_span("good"):
            pass
    assert {*close(recorder)} == {"good"}
    assert recorder.lost.total() == 2
    assert recorder.num_spans == 3
    assert "2 of the attempt's 3 spans were lost" in (recorder.why_lost() or "")


def test_a_reward_by_attributes_is_the_rollouts_reward(tracer: trace.Tracer) -> None:
    recorder = SpanRecorder("ro-1", "at-1")
    with recording(recorder), tracer.start_as_current_span("agentlightning.annotation") as span:
        span.set_attribute("agentlightning.reward.0.value", 0.5)
    assert recorder.last_reward() == 0.5


INSTALL = """
import logging
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from agl_ray.tracing import SpanRecorder, follow, recording

early = trace.get_tracer("made before anything is installed")
theirs = InMemorySpanExporter()
if {own}:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(theirs))
    trace.set_tracer_provider(provider)
follow()
follow()
recorder = SpanRecorder("ro-1", "at-1")
with recording(recorder):
    early.start_span("early").end()
    trace.get_tracer("late").start_span("late").end()
    trace.get_tracer_provider().shutdown()
    trace.get_tracer("late").start_span("after shutdown").end()
print([row["name"] for row in recorder.close()], [span.name for span in theirs.get_finished_spans()])
"""


@pytest.mark.parametrize("own", [True, False])
def test_the_users_provider_stays_and_is_watched(own: bool) -> None:
    """In a process of its own: the global provider can be set once."""
    told = subprocess.run(
        [sys.executable, "-c", INSTALL.format(own=own)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    ours = "['early', 'late', 'after shutdown']"
    assert told.stdout.strip() == f"{ours} {['early', 'late'] if own else []}"
