"""OTLP, the OpenTelemetry protocol: requests of `/v1/traces` as rows of SPAN_SCHEMA, and rows as such a request.

What it is: `request_of` decodes a body (protobuf or JSON), `rows_of_request` makes rows of it and says which spans are refused and
why, `request_of_rows` is the way back for export. A row that came in by OTLP goes out as it came; what the gateway and the emitters record
goes out with `gen_ai.*`, `agentlightning.reward.0.*` and `agl.*` attributes, token columns only when asked for.
Who calls it: `agl_ray.store.doors.otlp`, exports. Test alone: tests/unit/test_spans_otlp.py.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
from google.protobuf import json_format
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from agl_ray.spans import otel
from agl_ray.spans.otel_values import clean, original, plain_bytes, plain_float, plain_map
from agl_ray.spans.schema import KIND_SPAN
from agl_ray.types import InputError

TOKEN_COLUMNS = ("prompt_ids", "response_ids", "response_logprobs", "weight_versions")
_CALL_COLUMNS = ("dialect", "parent_call", "parent_tokens")
_KIND = "SPAN_KIND_"
_STATUS = {0: "UNSET", 1: "OK", 2: "ERROR"}
_CODES = {name: Status.StatusCode.ValueType(code) for code, name in _STATUS.items()}
_INT64 = range(-(2**63), 2**63)
_MOST_DEPTH = 200  # JSON brackets around a value; protobuf itself stops at 100


class Refused(NamedTuple):
    """A span that is not taken."""

    span_id: str
    reason: str


class Parsed(NamedTuple):
    """rows: in the order sent, each with the columns that are set. refused: the other spans."""

    rows: list[dict[str, Any]]
    refused: list[Refused]


# In.


def request_of(body: bytes, *, is_json: bool) -> ExportTraceServiceRequest:
    """The request in `body`; InputError where it is none."""
    try:
        if is_json:
            return _from_json(body)
        return ExportTraceServiceRequest.FromString(body)
    except (DecodeError, json_format.ParseError, msgspec.DecodeError, RecursionError) as error:
        form = "JSON" if is_json else "protobuf"
        raise InputError(
            f"body: expected an ExportTraceServiceRequest in {form}: {error}"
        ) from error


def _from_json(body: bytes) -> ExportTraceServiceRequest:
    """OTLP's JSON is protobuf's, but for ids, which are hexadecimal there and base64 here."""
    content = msgspec.json.decode(body)
    if not isinstance(content, dict):
        raise json_format.ParseError(f"expected an object, got {type(content).__name__}")
    for span in _json_spans(content):
        _ids_to_base64(span, ("traceId", "spanId", "parentSpanId"))
        for link in _dicts(span.get("links")):
            _ids_to_base64(link, ("traceId", "spanId"))
    request = ExportTraceServiceRequest()
    json_format.ParseDict(
        content, request, ignore_unknown_fields=True, max_recursion_depth=_MOST_DEPTH
    )
    return request


def _json_spans(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for resource in _dicts(content.get("resourceSpans")):
        for scope in _dicts(resource.get("scopeSpans")):
            yield from _dicts(scope.get("spans"))


def _dicts(value: Any) -> list[dict[str, Any]]:
    """Objects of a list; anything else is left for the parser to refuse."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _ids_to_base64(holder: dict[str, Any], names: Iterable[str]) -> None:
    for name in names:
        value = holder.get(name)
        if value is None:
            continue
        try:
            holder[name] = base64.b64encode(binascii.unhexlify(value)).decode()
        except (binascii.Error, TypeError, ValueError) as error:
            raise json_format.ParseError(
                f"{name}: expected hexadecimal digits, got {value!r}"
            ) from error


def rows_of_request(request: ExportTraceServiceRequest) -> Parsed:
    """Every span as a row, or the reason why it is refused: no rollout or attempt id, bad span id, bad reward, bad time."""
    parsed = Parsed([], [])
    for group in request.resource_spans:
        resource = _plain_map(group.resource.attributes)
        if group.schema_url:
            resource[otel.SCHEMA_URL] = group.schema_url
        for scoped in group.scope_spans:
            for span in scoped.spans:
                try:
                    parsed.rows.append(_row(span, scoped.scope, resource))
                except InputError as error:
                    parsed.refused.append(Refused(span.span_id.hex(), str(error)))
    return parsed


def _row(span: Span, scope: InstrumentationScope, resource: Mapping[str, Any]) -> dict[str, Any]:
    span_id = _id("span_id", span.span_id, 8)
    attributes = _plain_map(span.attributes) | _beside(span, scope)
    rollout_id, attempt_id, sequence_id = otel.ids_of(attributes, resource)
    if rollout_id is None or attempt_id is None:
        missing = otel.ROLLOUT_ID if rollout_id is None else otel.ATTEMPT_ID
        raise InputError(f"no attribute {missing} (text) on the span or its resource")
    return otel.row_of(
        rollout_id=rollout_id,
        attempt_id=attempt_id,
        sequence_id=sequence_id,
        trace_id=_id("trace_id", span.trace_id, 16),
        span_id=span_id,
        parent_id=_id("parent_span_id", span.parent_span_id, 8) if span.parent_span_id else None,
        name=span.name,
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        status=_STATUS.get(span.status.code, "UNSET"),
        status_message=span.status.message or None,
        attributes=attributes,
        resource=resource,
        events=[
            {
                "name": event.name,
                "time_ns": event.time_unix_nano,
                "attributes": _plain_map(event.attributes),
            }
            for event in span.events
        ],
        links=[
            {
                "trace_id": link.trace_id.hex(),
                "span_id": link.span_id.hex(),
                "attributes": _plain_map(link.attributes),
            }
            for link in span.links
        ],
    )


def _id(field: str, value: bytes, size: int) -> str:
    if len(value) != size or not any(value):
        raise InputError(
            f"{field}: expected {size} bytes that are not all zero, got {value.hex()!r}"
        )
    return value.hex()


def _beside(span: Span, scope: InstrumentationScope) -> dict[str, Any]:
    """What a row has no column for, as attributes; nothing where it is the usual."""
    usual = (Span.SPAN_KIND_UNSPECIFIED, Span.SPAN_KIND_INTERNAL)
    known = span.kind in Span.SpanKind.values() and span.kind not in usual
    given = {
        otel.SPAN_KIND: Span.SpanKind.Name(span.kind).removeprefix(_KIND) if known else None,
        otel.SCOPE_NAME: scope.name,
        otel.SCOPE_VERSION: scope.version,
        otel.TRACE_STATE: span.trace_state,
        **{name: getattr(span, f"dropped_{of}_count") for of, name in otel.DROPPED.items()},
    }
    return {name: value for name, value in given.items() if value}


def _plain_map(pairs: Iterable[KeyValue]) -> dict[str, Any]:
    return {pair.key: _plain(pair.value) for pair in pairs}


def _plain(value: AnyValue) -> Any:
    """See `agl_ray.spans.otel_values`; a value that holds nothing is None."""
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_plain(item) for item in value.array_value.values]
    if kind == "kvlist_value":
        return plain_map(_plain_map(value.kvlist_value.values))
    if kind == "bytes_value":
        return plain_bytes(value.bytes_value)
    if kind == "double_value":
        return plain_float(value.double_value)
    return None if kind is None else getattr(value, kind)


# Out.


def request_of_rows(
    rows: Iterable[Mapping[str, Any]], *, token_ids: bool = False
) -> ExportTraceServiceRequest:
    """Rows (JSON columns decoded, as `LightningStore.read_spans` + `rows_of` give them) as one export request.

    Ids go into the resource, in agent-lightning's names. Spans without a trace id share one per attempt; ids that are not OpenTelemetry's
    are replaced by hashes of themselves, the same everywhere. token_ids: also the columns of TOKEN_COLUMNS (large), as `agl.*`.
    """
    request = ExportTraceServiceRequest()
    groups: dict[tuple[str, str, str], Any] = {}
    for row in rows:
        resource = dict(row.get("resource") or {})
        key = (row["rollout_id"], row["attempt_id"], json.dumps(resource, sort_keys=True))
        if key not in groups:
            schema_url = str(resource.pop(otel.SCHEMA_URL, ""))
            ids = {otel.ROLLOUT_ID: row["rollout_id"], otel.ATTEMPT_ID: row["attempt_id"]}
            made = Resource(attributes=_key_values(resource | ids))
            groups[key] = request.resource_spans.add(resource=made, schema_url=schema_url), {}
        group, scopes = groups[key]
        attributes = _attributes_of(row, token_ids)
        scope = (attributes.pop(otel.SCOPE_NAME, ""), attributes.pop(otel.SCOPE_VERSION, ""))
        if scope not in scopes:
            scopes[scope] = group.scope_spans.add(
                scope=InstrumentationScope(name=str(scope[0]), version=str(scope[1]))
            )
        scopes[scope].spans.append(_span(row, attributes))
    return request


def _attributes_of(row: Mapping[str, Any], token_ids: bool) -> dict[str, Any]:
    """The row's attributes and, where they do not say it already, its columns."""
    attributes = dict(row.get("attributes") or {})
    finish = row.get("finish_reason")
    columns = {
        otel.SEQUENCE_ID: row.get("sequence_id"),
        otel.ROLE: row.get("role"),
        otel.MODEL[0]: None if otel.MODEL[1] in attributes else row.get("model"),
        otel.PROMPT_TOKENS[0]: row.get("prompt_tokens"),
        otel.RESPONSE_TOKENS[0]: row.get("response_tokens"),
        otel.FINISH_REASONS: None if finish is None else [finish],
        otel.REWARD_VALUE: row.get("reward"),
        **{f"agl.{name}": row.get(name) for name in _CALL_COLUMNS},
    }
    if columns[otel.REWARD_VALUE] is not None:
        columns[otel.REWARD_NAME] = row.get("reward_dimension")
        columns["agl.reward_target"] = row.get("reward_target")
    elif row["kind"] != KIND_SPAN:
        columns["agl.kind"] = row["kind"]
    if token_ids:
        columns |= {f"agl.{name}": row.get(name) for name in TOKEN_COLUMNS}
    for name, value in columns.items():
        # The store's number of a span is the true one; everything else the span itself knows best.
        if value is not None and (name == otel.SEQUENCE_ID or name not in attributes):
            attributes[name] = value
    return attributes


def _span(row: Mapping[str, Any], attributes: dict[str, Any]) -> Span:
    whose = f"{row['rollout_id']}/{row['attempt_id']}"
    kind = str(attributes.pop(otel.SPAN_KIND, "INTERNAL"))
    dropped = {of: attributes.pop(name, 0) for of, name in otel.DROPPED.items()}
    return Span(
        trace_id=_id_bytes(row.get("trace_id") or whose, 16),
        span_id=_id_bytes(row["span_id"], 8),
        parent_span_id=_id_bytes(row["parent_id"], 8) if row.get("parent_id") else b"",
        trace_state=str(attributes.pop(otel.TRACE_STATE, "")),
        name=clean(row["name"]),
        kind=dict(Span.SpanKind.items()).get(_KIND + kind, Span.SPAN_KIND_INTERNAL),
        start_time_unix_nano=row["start_ns"],
        end_time_unix_nano=row["end_ns"],
        status=Status(code=_CODES[row["status"]], message=clean(row.get("status_message") or "")),
        events=[_event(event, row["start_ns"]) for event in _dicts(row.get("events"))],
        links=[_link(link) for link in _dicts(row.get("links"))],
        attributes=_key_values(attributes),
        **{f"dropped_{of}_count": int(number) for of, number in dropped.items()},
    )


def _event(event: Mapping[str, Any], start_ns: int) -> Span.Event:
    """An event as this room writes them; one that somebody wrote by hand may lack anything but what it says."""
    return Span.Event(
        name=clean(str(event.get("name", "event"))),
        time_unix_nano=event.get("time_ns", start_ns),
        attributes=_key_values(event.get("attributes") or {}),
    )


def _link(link: Mapping[str, Any]) -> Span.Link:
    return Span.Link(
        trace_id=_id_bytes(str(link.get("trace_id", "")), 16),
        span_id=_id_bytes(str(link.get("span_id", "")), 8),
        attributes=_key_values(link.get("attributes") or {}),
    )


def _id_bytes(text: str, size: int) -> bytes:
    """An id as OpenTelemetry has it; of any other text a hash that is always the same."""
    if re.fullmatch(f"[0-9a-f]{{{2 * size}}}", text):
        return bytes.fromhex(text)
    return hashlib.sha256(text.encode()).digest()[:size]


def _key_values(items: Mapping[str, Any]) -> list[KeyValue]:
    return [
        KeyValue(key=clean(key), value=_any_value(original(value))) for key, value in items.items()
    ]


def _any_value(value: Any) -> AnyValue:
    made = AnyValue()
    if isinstance(value, bool):
        made.bool_value = value
    elif isinstance(value, int) and value in _INT64:
        made.int_value = value
    elif isinstance(value, float):
        made.double_value = value
    elif isinstance(value, bytes):
        made.bytes_value = value
    elif isinstance(value, Mapping):
        made.kvlist_value.SetInParent()
        for key, item in value.items():
            made.kvlist_value.values.add(key=clean(key), value=_any_value(item))
    elif isinstance(value, list | tuple):
        made.array_value.SetInParent()
        made.array_value.values.extend(_any_value(item) for item in value)
    elif value is not None:
        made.string_value = clean(str(value))
    return made
