"""Programs that an agent starts know where their spans belong; a real one sends them to a real store."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from http_store import served

import agl_ray as agl
from agl_ray.agents import run_agent
from agl_ray.tracing import SpanRecorder, child_variables, recording, subprocesses
from agl_ray.types import EndReason

SHOW = "import json, os; print(json.dumps({k: v for k, v in os.environ.items() if 'OTEL' in k or k == 'TRACEPARENT'}))"
SENDS = """
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

provider = TracerProvider()
provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
with provider.get_tracer("child").start_as_current_span("in the child"):
    pass
provider.shutdown()
"""


@pytest.fixture(autouse=True)
def following(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if "OTEL" in name:
            monkeypatch.delenv(name)
    subprocesses.follow_subprocesses()
    yield
    subprocess.Popen.__init__ = subprocesses._init  # type: ignore[method-assign]


def test_what_a_program_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "OTEL_RESOURCE_ATTRIBUTES", "service.name=shop,agentlightning.rollout_id=old"
    )
    recorder = SpanRecorder("ro-1", "at/1", otlp_endpoint="http://h:1/v1/traces")
    with recording(recorder), agl.operation() as op:
        told = child_variables({**os.environ, "AGL_STORE_API_KEY": "a key"})
    root = recorder.root
    assert told == {
        "OTEL_RESOURCE_ATTRIBUTES": "service.name=shop,agentlightning.rollout_id=ro-1,agentlightning.attempt_id=at/1",
        "TRACEPARENT": f"00-{root.trace_id:032x}-{op.span().span_id}-01",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://h:1/v1/traces",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_TRACES_EXPORTER": "otlp",
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "authorization=Bearer%20a%20key",
    }
    with recording(recorder):
        kept = child_variables({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://jaeger:4318"})
    assert {*kept} == {"OTEL_RESOURCE_ATTRIBUTES", "TRACEPARENT"}
    with pytest.raises(RuntimeError, match="no rollout"):
        child_variables()


def test_every_way_to_start_a_program_tells_it() -> None:
    async def apart() -> str:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", SHOW, stdout=subprocess.PIPE
        )
        return (await process.communicate())[0].decode()

    command = [sys.executable, "-c", SHOW]
    recorder = SpanRecorder("ro-1", "at-1")
    with recording(recorder):
        said = [
            subprocess.run(command, capture_output=True, text=True, check=True).stdout,
            subprocess.check_output(command, env={b"PATH": os.environb[b"PATH"]}, text=True),
            asyncio.run(apart()),
        ]
        with pytest.raises(TypeError):
            subprocess.Popen(command, no_such_option=1)
    for text in said:
        told = json.loads(text)
        assert "agentlightning.attempt_id=at-1" in told["OTEL_RESOURCE_ATTRIBUTES"]
        assert told["TRACEPARENT"].startswith(f"00-{recorder.root.trace_id:032x}-")
    assert json.loads(subprocess.check_output(command, text=True)) == {}


def test_a_program_with_the_standard_exporter_sends_its_spans_to_its_attempt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Started by an agent's own code, and as the agent itself."""
    monkeypatch.setenv("AGL_STORE_API_KEY", "secret")
    command = [sys.executable, "-c", SENDS + "print('{\"reward\": 0.5}')"]

    @agl.rollout
    def starts_one(task: Any) -> float:
        return float(json.loads(subprocess.check_output(command, text=True))["reward"])

    with served(api_key="secret") as store:
        client = store.client("secret")

        async def scenario(agent: Any) -> None:
            begun = await client.start_rollout({})
            key = begun.rollout_id, begun.attempt_id
            recorder = SpanRecorder(*key, otlp_endpoint=client.otlp_traces_endpoint())
            outcome = await run_agent(agent, begun, {}, recorder, 60.0)
            assert (outcome.reason, outcome.reward) == (EndReason.OK, 0.5)
            (row,) = await client.query_span_rows(*key)
            assert row["name"] == "in the child"

        asyncio.run(scenario(starts_one))
        asyncio.run(scenario(agl.CommandAgent(command)))
