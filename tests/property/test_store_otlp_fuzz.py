"""Whatever is sent to the OTLP door is stored, refused in the answer, or answered with a status of the protocol: never a 500."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from agl_ray.spans.otlp import request_of_rows
from agl_ray.store import LightningStore, StoreCore
from agl_ray.store.doors.otlp import OtlpCounts, otlp_app
from agl_ray.types import EnqueueRolloutRequest

PROTOBUF, JSON = "application/x-protobuf", "application/json"


def send(requests: list[tuple[str, str, bytes]]) -> tuple[list[int], OtlpCounts, int]:
    """(statuses, counts, spans in the store) of (content type, encoding, body)s sent one by one."""

    async def main() -> tuple[list[int], OtlpCounts, int]:
        core = await StoreCore.open("memory://")
        store, counts = LightningStore.local(core), OtlpCounts()
        app = otlp_app(store, max_bytes=20_000, counts=counts)
        await store.enqueue_many_rollouts([EnqueueRolloutRequest(input=1, rollout_id="ro-1")])
        taken = await store.dequeue_rollout()
        assert taken is not None
        statuses = []
        for media, encoding, body in requests:
            ours = body.replace(b"at-00000000", taken.attempt_id.encode())
            statuses.append(await call(app, media, encoding, ours))
        found = await store.get_attempt("ro-1", taken.attempt_id)
        await core.close()
        return statuses, counts, found.num_spans

    return asyncio.run(main())


async def call(app: Any, media: str, encoding: str, body: bytes) -> int:
    if encoding == "gzip":
        body = gzip.compress(body)
    headers = [(b"content-type", media.encode()), (b"content-encoding", encoding.encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/traces", "headers": headers}
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def answer(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, answer)
    return int(sent[0]["status"])


def valid(number: int, rollout_id: str, attempt_id: str) -> ExportTraceServiceRequest:
    row = {
        "rollout_id": rollout_id,
        "attempt_id": attempt_id,
        "span_id": f"{number:016x}",
        "name": "n",
        "kind": "span",
        "start_ns": number,
        "end_ns": number,
        "status": "OK",
        "attributes": {"a": [1, {"b": 0.5}]},
        "events": [{"name": "e", "time_ns": 1, "attributes": {}}],
    }
    return request_of_rows([row])


BODIES = st.binary(max_size=60) | st.builds(
    lambda body, at, byte: body[:at] + bytes([byte]) + body[at + 1 :],
    st.just(valid(5, "ro-1", "at-00000000").SerializeToString()),
    st.integers(0, 140),
    st.integers(0, 255),
)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *("resourceSpans", "scopeSpans", "spans", "resource", "attributes", "events"),
                    *("links", "traceId", "spanId", "key", "value", "intValue", "arrayValue"),
                    *("startTimeUnixNano", "status", "kind", "scope"),
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=15,
)
DOCUMENTS = JUNK | st.builds(
    lambda span: {"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]}, JUNK
)


@settings(max_examples=40, deadline=None)
@given(
    bodies=st.lists(BODIES, max_size=6),
    documents=st.lists(DOCUMENTS, max_size=6),
    encoding=st.sampled_from(["identity", "gzip", "deflate", "br"]),
)
def test_no_body_makes_the_door_fail(
    bodies: list[bytes], documents: list[Any], encoding: str
) -> None:
    requests = [(PROTOBUF, encoding, body) for body in bodies]
    requests += [(JSON, encoding, json.dumps(document).encode()) for document in documents]
    statuses, _, _ = send(requests)
    assert set(statuses) <= {200, 400, 413}


IDS = st.sampled_from(
    ["ro-1", "at-00000000", "latest", "", "a b", "x\0y", "at-other", "\u00e9" * 200]
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), IDS, IDS), min_size=1, max_size=6))
def test_every_span_is_stored_once_or_refused_and_counted(sent: list[tuple[int, str, str]]) -> None:
    requests = [valid(*one) for one in sent]
    statuses, counts, stored = send(
        [(PROTOBUF, "identity", one.SerializeToString()) for one in requests]
    )
    assert set(statuses) == {200}
    good = [number for number, *ids in sent if ids == ["ro-1", "at-00000000"]]
    assert stored == len(set(good))
    assert (counts.spans, counts.refused.total()) == (len(good), len(sent) - len(good))
