"""OTLP/HTTP: any OpenTelemetry SDK or collector sends spans to the store.

    POST /v1/traces     ExportTraceServiceRequest as application/x-protobuf or application/json; gzip or deflate
    POST /v1/metrics, /v1/logs, /v1/development/profiles     501, so that an exporter stops trying

What it is: spans are stored per attempt, in batches whose id is made of their span ids, so an exporter that sends a request again stores
nothing twice. A span that names no rollout and attempt, or one that the store does not know, is refused in the answer, in the
protocol's own form (`partial_success`: how many, and why), counted and logged; it is never dropped silently. An error is a
`google.rpc.Status`, in the form of the request; 503 with Retry-After says that the store is away and the request may be sent again.
Which attributes are read is told in `agl_ray.spans.otel`.
Who calls it: `agl_ray.store.doors.app`, or any ASGI server. Test alone: tests/unit/test_store_otlp.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa

from agl_ray.ops.asgi import (
    JSON,
    MAX_BODY,
    App,
    Gone,
    Receive,
    Scope,
    Send,
    TooLarge,
    read_body,
    respond,
)
from agl_ray.spans import span_batch
from agl_ray.spans.otel import ATTEMPT_ID, ROLLOUT_ID
from agl_ray.store.checks import check_id
from agl_ray.store.client import LightningStore
from agl_ray.store.transport import StoreAway
from agl_ray.types import AglError, Conflict, InputError, NotFound, StoreError, WaitTimeout

log = logging.getLogger("agl_ray.store")

PROTOBUF = "application/x-protobuf"
RETRY_AFTER = b"1"  # seconds
_NOT_TAKEN = frozenset({"/metrics", "/logs", "/development/profiles"})
_MOST_MEMBERS = 100  # of a gzip body; an exporter writes one
_MOST_REASONS = 3  # told in an answer

AttemptKey = tuple[str, str]


@dataclass
class OtlpCounts:
    """What came in since the start. refused: spans by reason (`ids`, `span`, `rollout`, `store`); it sums up to what the answers said."""

    requests: int = 0
    spans: int = 0  # stored, or there already
    refused: Counter[str] = field(default_factory=Counter)


class _Refusal(NamedTuple):
    kind: str
    number: int
    reason: str


class _Batch(NamedTuple):
    key: AttemptKey
    batch_id: str
    spans: int  # sent; a span sent twice in one request is in the batch once
    batch: pa.RecordBatch


class _NoAnswer(AglError):
    """An HTTP status other than 200, with its reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def otlp_app(
    store: LightningStore, *, max_bytes: int = MAX_BODY, counts: OtlpCounts | None = None
) -> App:
    """The ASGI application. max_bytes: of a request's body, as sent and again as decompressed. counts: filled as requests come."""
    return OtlpDoor(store, max_bytes, counts or OtlpCounts())


class OtlpDoor:
    """See the module's text; made by `otlp_app`."""

    def __init__(self, store: LightningStore, max_bytes: int, counts: OtlpCounts) -> None:
        self._store, self._max_bytes, self.counts = store, max_bytes, counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = {
            key.decode("latin-1").lower(): value.decode("latin-1")
            for key, value in scope["headers"]
        }
        media = headers.get("content-type", "").partition(";")[0].strip().lower()
        try:
            answer = await self._answer(scope, headers, media, receive)
        except Gone:
            log.info("an exporter went away while it was sending")
            return
        except _NoAnswer as error:
            await _respond_status(send, error.status, str(error), media)
            return
        except Exception:
            log.exception("a request of an exporter failed in the store's door")
            await _respond_status(send, 500, "the store's door failed; its log says why", media)
            return
        await respond(send, 200, answer, media)

    async def _answer(
        self, scope: Scope, headers: Mapping[str, str], media: str, receive: Receive
    ) -> bytes:
        _check(scope, media)
        try:
            body = await read_body(receive, self._max_bytes)
            encoding = headers.get("content-encoding", "identity").strip().lower()
            batches, refused = await asyncio.to_thread(
                _decode, body, encoding, self._max_bytes, media == JSON
            )
        except TooLarge as error:
            raise _NoAnswer(413, str(error)) from error
        except InputError as error:
            raise _NoAnswer(400, str(error)) from error
        refused += await self._put(batches)
        self.counts.requests += 1
        self.counts.spans += sum(one.spans for one in batches)
        self.counts.spans -= sum(one.number for one in refused if one.kind in ("rollout", "store"))
        for kind, number, _ in refused:
            self.counts.refused[kind] += number
        return _answer_of(refused, media == JSON)

    async def _put(self, batches: list[_Batch]) -> list[_Refusal]:
        """Store all batches; what the store will never take is refused, what it cannot take now is a 503 for the whole."""
        puts = [
            self._store.add_spans(*one.key, one.batch, batch_id=one.batch_id) for one in batches
        ]
        refused: list[_Refusal] = []
        results = await asyncio.gather(*puts, return_exceptions=True)
        for batch, result in zip(batches, results, strict=True):
            if isinstance(result, StoreError | WaitTimeout | StoreAway):
                raise _NoAnswer(503, f"the store is away, send again: {result}") from result
            if isinstance(result, NotFound):
                refused.append(_Refusal("rollout", batch.spans, str(result)))
            elif isinstance(result, InputError | Conflict):
                refused.append(_Refusal("store", batch.spans, str(result)))
            elif isinstance(result, BaseException):
                raise result
        return refused


def _check(scope: Scope, media: str) -> None:
    """_NoAnswer unless this is a request for traces in a form that is understood."""
    path = scope["path"].removeprefix("/v1").rstrip("/")
    if path in _NOT_TAKEN:
        raise _NoAnswer(501, f"{scope['path']}: this store takes traces only (/v1/traces)")
    if path != "/traces":
        raise _NoAnswer(404, f"{scope['path']}: expected /v1/traces")
    if scope["method"] != "POST":
        raise _NoAnswer(405, f"/v1/traces: expected POST, got {scope['method']}")
    if media not in (PROTOBUF, JSON):
        raise _NoAnswer(415, f"content-type: expected {PROTOBUF} or {JSON}, got {media!r}")


def _decode(
    body: bytes, encoding: str, limit: int, is_json: bool
) -> tuple[list[_Batch], list[_Refusal]]:
    """Batches and refusals of a body. InputError where it is no request of the protocol."""
    from agl_ray.spans.otlp import request_of, rows_of_request

    request = request_of(inflate(body, encoding, limit), is_json=is_json)
    parsed = rows_of_request(request)
    refused = [
        _Refusal("ids" if one.reason.startswith("no attribute") else "span", 1, one.reason)
        for one in parsed.refused
    ]
    groups: dict[AttemptKey, list[dict[str, Any]]] = {}
    for row in parsed.rows:
        groups.setdefault((row["rollout_id"], row["attempt_id"]), []).append(row)
    for key in list(groups):
        reason = _no_id(key)
        if reason is not None:
            refused.append(_Refusal("ids", len(groups.pop(key)), reason))
    return [_batch(key, rows) for key, rows in groups.items()], refused


def _no_id(key: AttemptKey) -> str | None:
    """Why this cannot be an attempt's key, if it cannot."""
    try:
        check_id(ROLLOUT_ID, key[0])
        check_id(ATTEMPT_ID, key[1])
    except InputError as error:
        return str(error)
    return "attempt id 'latest': expected the attempt's own id" if key[1] == "latest" else None


def _batch(key: AttemptKey, rows: list[dict[str, Any]]) -> _Batch:
    """The rows in the order of their sequence ids, where they have some; of a span id only its first."""
    unique: dict[str, dict[str, Any]] = {}
    for row in rows:
        unique.setdefault(row["span_id"], row)
    ordered = sorted(unique.values(), key=lambda row: row["sequence_id"] or float("inf"))
    digest = hashlib.sha256("\n".join(sorted(unique)).encode()).hexdigest()
    return _Batch(key, f"otlp-{digest[:32]}", len(rows), span_batch(ordered))


def inflate(body: bytes, encoding: str, limit: int) -> bytes:
    """`body` decompressed. InputError where it is not what `encoding` says, TooLarge above `limit` bytes."""
    if encoding in ("identity", ""):
        return body
    if encoding in ("gzip", "x-gzip"):
        return _inflate(body, 31, encoding, limit)
    if encoding != "deflate":
        raise InputError(f"content-encoding: expected gzip, deflate or none, got {encoding!r}")
    try:
        return _inflate(body, 15, encoding, limit)
    except TooLarge:
        raise
    except InputError:  # some send deflate without the frame that HTTP wants around it
        return _inflate(body, -15, encoding, limit)


def _inflate(body: bytes, bits: int, encoding: str, limit: int) -> bytes:
    """`bits`: zlib's word for the frame (31: gzip, 15: zlib, -15: none)."""
    parts: list[bytes] = []
    size, rest = 0, body
    for _ in range(_MOST_MEMBERS):
        stream = zlib.decompressobj(bits)
        try:
            parts.append(stream.decompress(rest, limit - size + 1))
        except zlib.error as error:
            raise InputError(f"body: expected {encoding} data: {error}") from error
        size += len(parts[-1])
        if size > limit:
            raise TooLarge(f"body: expected at most {limit} bytes decompressed; send it in parts")
        if not stream.eof:
            raise InputError(f"body: the {encoding} data ends too early")
        rest = stream.unused_data
        if not rest:
            return b"".join(parts)
    raise InputError(f"body: expected at most {_MOST_MEMBERS} gzip members, got more")


def _answer_of(refused: Iterable[_Refusal], is_json: bool) -> bytes:
    """An ExportTraceServiceResponse; with nothing refused it is empty, as the protocol wants it."""
    from google.protobuf import json_format
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

    reasons: Counter[str] = Counter()
    for _, number, reason in refused:
        reasons[reason] += number
    answer = ExportTraceServiceResponse()
    if reasons:
        told = [f"{number} x {reason}" for reason, number in reasons.most_common(_MOST_REASONS)]
        if len(reasons) > _MOST_REASONS:
            told.append(f"and {len(reasons) - _MOST_REASONS} other reasons")
        answer.partial_success.rejected_spans = reasons.total()
        answer.partial_success.error_message = "; ".join(told)
        log.warning("OTLP: %d spans refused: %s", reasons.total(), "; ".join(told))
    return (
        json_format.MessageToJson(answer, indent=None).encode()
        if is_json
        else answer.SerializeToString()
    )


async def _respond_status(send: Send, status: int, reason: str, media: str) -> None:
    """An error in the protocol's form: a google.rpc.Status without its code, which the protocol does not use."""
    text = reason.encode("utf-8", "backslashreplace").decode()
    if media == PROTOBUF:
        from opentelemetry.proto.trace.v1.trace_pb2 import Status

        # On the wire google.rpc.Status and OpenTelemetry's own Status have their message in the same field.
        body = Status(message=text).SerializeToString()
    else:
        media, body = JSON, msgspec.json.encode({"message": text})
    headers = [(b"content-type", media.encode()), (b"content-length", str(len(body)).encode())]
    if status == 503:
        headers.append((b"retry-after", RETRY_AFTER))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
