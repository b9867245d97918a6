"""The OTLP door over a real server and a sqlite store: a real exporter, raw JSON, what is refused and how."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from asgi_serving import serving
from google.rpc.status_pb2 import Status as RpcStatus
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    SimpleSpanProcessor,
    SpanExportResult,
)
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from agl_ray.spans.otlp import request_of_rows
from agl_ray.store import LightningStore, StoreCore
from agl_ray.store.doors.otlp import OtlpCounts, inflate, otlp_app
from agl_ray.store.payload import rows_of
from agl_ray.types import AttemptedRollout, EndReason, InputError

PROTOBUF = {"content-type": "application/x-protobuf"}
JSON = {"content-type": "application/json"}
Scenario = Callable[[LightningStore, str, OtlpCounts], Awaitable[None]]


def run(folder: Path, scenario: Scenario, **options: Any) -> None:
    async def main() -> None:
        core = await StoreCore.open(f"sqlite:///{folder}/store.db")
        counts = OtlpCounts()
        try:
            store = LightningStore.local(core)
            async with serving(otlp_app(store, counts=counts, **options)) as url:
                await scenario(store, url, counts)
        finally:
            await core.close()

    asyncio.run(main())


def export(url: str, resource: dict[str, str], names: list[str], compression: Compression) -> None:
    """What a user's program does: nothing in it is ours."""
    exporter = OTLPSpanExporter(f"{url}/v1/traces", compression=compression)
    provider = TracerProvider(resource=Resource(resource))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    tracer = provider.get_tracer("app")
    for name in names:
        with tracer.start_as_current_span(name) as span:
            span.set_attribute("gen_ai.request.model", "m")
            if name == "graded":
                span.set_attribute("agentlightning.reward.0.value", 0.25)
    provider.shutdown()


def resource_of(attempt: AttemptedRollout) -> dict[str, str]:
    return {
        "agentlightning.rollout_id": attempt.rollout_id,
        "agentlightning.attempt_id": attempt.attempt_id,
    }


def span_row(attempt: AttemptedRollout, number: int, **columns: Any) -> dict[str, Any]:
    return {
        "rollout_id": attempt.rollout_id,
        "attempt_id": attempt.attempt_id,
        "span_id": f"{number:016x}",
        "name": f"n{number}",
        "kind": "span",
        "start_ns": number,
        "end_ns": number,
        "status": "OK",
        **columns,
    }


async def stored(store: LightningStore, attempt: AttemptedRollout) -> list[dict[str, Any]]:
    return rows_of(await store.read_spans([(attempt.rollout_id, attempt.attempt_id)]))


async def post(
    url: str, body: bytes, headers: dict[str, str], path: str = "/v1/traces"
) -> httpx.Response:
    async with httpx.AsyncClient() as client:
        return await client.post(url + path, content=body, headers=headers)


@pytest.mark.parametrize("compression", list(Compression))
def test_a_real_exporter_sends_spans(tmp_path: Path, compression: Compression) -> None:
    async def scenario(store: LightningStore, url: str, counts: OtlpCounts) -> None:
        attempt = await store.start_rollout({"q": 1})
        names = ["plan", "act", "graded"]
        await asyncio.to_thread(export, url, resource_of(attempt), names, compression)
        rows = await stored(store, attempt)
        assert [row["name"] for row in rows] == names
        assert [row["sequence_id"] for row in rows] == [1, 2, 3]
        assert [row["reward"] for row in rows] == [None, None, 0.25]
        assert rows[0]["model"] == "m"
        assert "agentlightning.rollout_id" not in rows[0]["resource"]
        assert (counts.spans, counts.refused.total()) == (3, 0)
        found = await store.get_attempt(attempt.rollout_id, attempt.attempt_id)
        assert (found.status, found.num_spans) == ("running", 3)

    run(tmp_path, scenario)


def test_an_export_sent_again_stores_nothing_twice(tmp_path: Path) -> None:
    memory = InMemorySpanExporter()

    async def scenario(store: LightningStore, url: str, counts: OtlpCounts) -> None:
        attempts = [await store.start_rollout({"q": 1}), await store.start_rollout({"q": 2})]
        for attempt in attempts:
            provider = TracerProvider(resource=Resource(resource_of(attempt)))
            provider.add_span_processor(SimpleSpanProcessor(memory))
            for name in ("a", "b"):
                provider.get_tracer("x").start_span(name).end()
        spans = memory.get_finished_spans()
        exporter = OTLPSpanExporter(f"{url}/v1/traces")

        def send(some: tuple[ReadableSpan, ...]) -> SpanExportResult:
            return exporter.export(some)

        for _ in range(3):
            assert await asyncio.to_thread(send, spans) is SpanExportResult.SUCCESS
        for attempt in attempts:
            assert [row["name"] for row in await stored(store, attempt)] == ["a", "b"]
        one = attempts[0]
        await store.end_attempt(one.rollout_id, one.attempt_id, EndReason.OK, reward=1.0)
        assert await asyncio.to_thread(send, spans) is SpanExportResult.SUCCESS
        assert len(await stored(store, one)) == 2

    run(tmp_path, scenario)


@pytest.mark.parametrize("encoding", ["identity", "gzip", "deflate", "raw-deflate"])
def test_json_with_every_compression(tmp_path: Path, encoding: str) -> None:
    async def scenario(store: LightningStore, url: str, counts: OtlpCounts) -> None:
        attempt = await store.start_rollout({"q": 1})
        ids = [
            {"key": key, "value": {"stringValue": value}}
            for key, value in resource_of(attempt).items()
        ]
        span = {"traceId": "ab" * 16, "spanId": "cd" * 8, "name": "j", "attributes": ids}
        content = json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]}).encode()
        raw = zlib.compressobj(wbits=-15)
        body = {
            "identity": content,
            "gzip": gzip.compress(content[:50]) + gzip.compress(content[50:]),
            "deflate": zlib.compress(content),
            "raw-deflate": raw.compress(content) + raw.flush(),
        }[encoding]
        headers = {**JSON, "content-encoding": encoding.removeprefix("raw-")}
        answer = await post(url, body, headers)
        assert (answer.status_code, answer.json()) == (200, {})
        assert answer.headers["content-type"] == "application/json"
        assert [row["name"] for row in await stored(store, attempt)] == ["j"]

    run(tmp_path, scenario)


def test_spans_of_nobody_are_refused_in_the_answer_and_counted(tmp_path: Path) -> None:
    async def scenario(store: LightningStore, url: str, counts: OtlpCounts) -> None:
        attempt = await store.start_rollout({"q": 1})
        stranger = span_row(attempt, 2) | {"rollout_id": "ro-unknown"}
        latest = span_row(attempt, 3) | {"attempt_id": "latest"}
        request = request_of_rows([span_row(attempt, 1), stranger, latest])
        nobody = ExportTraceServiceRequest()
        span = request.resource_spans[0].scope_spans[0].spans[0]
        nobody.resource_spans.add().scope_spans.add().spans.append(span)
        request.MergeFrom(nobody)
        answer = await post(url, request.SerializeToString(), PROTOBUF)
        assert answer.status_code == 200
        result = ExportTraceServiceResponse.FromString(answer.content).partial_success
        assert result.rejected_spans == 3
        for part in ("'ro-unknown' is not in the store", "'latest'", "agentlightning.rollout_id"):
            assert part in result.error_message
        assert (counts.spans, dict(counts.refused)) == (1, {"ids": 2, "rollout": 1})
        assert len(await stored(store, attempt)) == 1
        body = json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [{"name": "x"}]}]}]})
        partial = (await post(url, body.encode(), JSON)).json()["partialSuccess"]
        assert partial["rejectedSpans"] == "1"
        assert "span_id: expected 8 bytes" in partial["errorMessage"]
        everything = await post(url, b"", PROTOBUF)
        assert (everything.status_code, everything.content) == (200, b"")

    run(tmp_path, scenario)


def test_order_within_a_request_follows_the_sequence_ids(tmp_path: Path) -> None:
    async def scenario(store: LightningStore, url: str, counts: OtlpCounts) -> None:
        attempt = await store.start_rollout({"q": 1})
        rows = [span_row(attempt, number, sequence_id=9 - number) for number in (1, 2, 3)]
        body = request_of_rows([*rows, rows[0]]).SerializeToString()
        assert (await post(url, body, PROTOBUF)).content == b""
        assert [row["name"] for row in await stored(store, attempt)] == ["n3", "n2", "n1"]

    run(tmp_path, scenario)


def test_what_is_no_request_is_answered_with_a_status(tmp_path: Path) -> None:
    async def scenario(store: LightningStore, url: str, counts: OtlpCounts) -> None:
        async def status(
            body: bytes, headers: dict[str, str], path: str = "/v1/traces"
        ) -> tuple[int, str]:
            answer = await post(url, body, headers, path)
            if answer.headers["content-type"] == "application/x-protobuf":
                return answer.status_code, RpcStatus.FromString(answer.content).message
            return answer.status_code, answer.json()["message"]

        bad = await status(b"\xff\xff", PROTOBUF)
        assert bad[0] == 400
        assert "ExportTraceServiceRequest in protobuf" in bad[1]
        assert (await status(b"{", JSON))[0] == 400
        assert (await status(b"", {"content-type": "text/plain"}))[0] == 415
        assert (await status(b"", PROTOBUF, "/v1/metrics"))[0] == 501
        assert (await status(b"{}", JSON, "/v1/logs"))[0] == 501
        assert (await status(b"{}", JSON, "/v1/other"))[0] == 404
        brotli = await status(b"x", {**PROTOBUF, "content-encoding": "br"})
        assert brotli == (400, "content-encoding: expected gzip, deflate or none, got 'br'")
        torn = gzip.compress(b"x" * 1000)[:-9]
        assert "ends too early" in (await status(torn, {**JSON, "content-encoding": "gzip"}))[1]
        assert (await status(b"nope", {**JSON, "content-encoding": "gzip"}))[0] == 400
        large = gzip.compress(b"[" * 50_000)
        assert len(large) < 10_000
        assert (await status(large, {**JSON, "content-encoding": "gzip"}))[0] == 413
        assert (await status(b" " * 10_001, JSON))[0] == 413
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"{url}/v1/traces")).status_code == 405

    run(tmp_path, scenario, max_bytes=10_000)


def test_a_store_that_is_away_is_503_and_nothing_is_lost_by_sending_again(tmp_path: Path) -> None:
    async def main() -> None:
        url = f"sqlite:///{tmp_path}/store.db"
        core = await StoreCore.open(url)
        store = LightningStore.local(core)
        attempt = await store.start_rollout({"q": 1})
        body = request_of_rows([span_row(attempt, 1)]).SerializeToString()
        async with serving(otlp_app(store)) as address:
            await core.close()
            away = await post(address, body, PROTOBUF)
            assert (away.status_code, away.headers["retry-after"]) == (503, "1")
            assert "shut down" in RpcStatus.FromString(away.content).message
        core = await StoreCore.open(url)
        store = LightningStore.local(core)
        async with serving(otlp_app(store)) as address:
            assert (await post(address, body, PROTOBUF)).status_code == 200
            assert len(await stored(store, attempt)) == 1
        await core.close()

    asyncio.run(main())


def test_inflate_gives_back_what_was_compressed_and_no_more_than_the_limit() -> None:
    assert inflate(gzip.compress(b"abc"), "gzip", 3) == b"abc"
    with pytest.raises(InputError, match="at most 2 bytes"):
        inflate(gzip.compress(b"abc"), "gzip", 2)
    with pytest.raises(InputError, match="gzip members"):
        inflate(gzip.compress(b"") * 1000, "gzip", 100)
    with pytest.raises(InputError, match="too early"):
        inflate(b"", "deflate", 100)
