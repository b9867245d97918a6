"""OpenTelemetry spans as rows and back: ids, rewards, model calls, every type of value, the SDK and both forms of OTLP."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue, KeyValueList
from opentelemetry.proto.trace.v1.trace_pb2 import Span as WireSpan
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Link, SpanKind, Status, StatusCode

from agl_ray.spans import SPAN_SCHEMA, span_batch
from agl_ray.spans.otel import row_of_readable, span_of_readable
from agl_ray.spans.otel_values import original, plain
from agl_ray.spans.otlp import request_of, request_of_rows, rows_of_request
from agl_ray.types import InputError

IDS = {"agentlightning.rollout_id": "ro-1", "agentlightning.attempt_id": "at-1"}


def sdk_span(
    attributes: dict[str, Any] | None = None, resource: dict[str, Any] | None = None, **options: Any
) -> ReadableSpan:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(resource=Resource(resource or {}))
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("scope", "1.2")
    with tracer.start_as_current_span("outer"):
        span = tracer.start_span("inner", attributes=attributes, **options)
        span.add_event("tick", {"n": 2**60})
        span.set_status(Status(StatusCode.ERROR, "no luck"))
        span.end()
    return next(one for one in exporter.get_finished_spans() if one.name == "inner")


def wire_span(**fields: Any) -> ExportTraceServiceRequest:
    attributes = fields.pop("attributes", {})
    request = ExportTraceServiceRequest()
    span = (
        request.resource_spans.add()
        .scope_spans.add()
        .spans.add(**{"trace_id": b"t" * 16, "span_id": b"s" * 8, "name": "n", **fields})
    )
    for key, value in {**IDS, **attributes}.items():
        made = value if isinstance(value, AnyValue) else AnyValue(string_value=value)
        span.attributes.add(key=key, value=made)
    return request


def only_row(request: ExportTraceServiceRequest) -> dict[str, Any]:
    parsed = rows_of_request(request)
    assert not parsed.refused
    (row,) = parsed.rows
    return row


def refusal(request: ExportTraceServiceRequest) -> str:
    parsed = rows_of_request(request)
    assert not parsed.rows
    return parsed.refused[0].reason


def test_an_sdk_span_is_a_row() -> None:
    link = Link(sdk_span().get_span_context(), {"why": "because"})
    span = sdk_span({**IDS, "x": (1, 2)}, {"service.name": "s"}, kind=SpanKind.CLIENT, links=[link])
    row = row_of_readable(span)
    assert (row["rollout_id"], row["attempt_id"]) == ("ro-1", "at-1")
    assert row["attributes"] == {
        "x": [1, 2],
        "otel.span.kind": "CLIENT",
        "otel.scope.name": "scope",
        "otel.scope.version": "1.2",
    }
    assert row["resource"] == {"service.name": "s"}
    assert (row["status"], row["status_message"]) == ("ERROR", "no luck")
    assert row["events"][0]["attributes"] == {"n": 2**60}
    assert row["events"][0]["time_ns"] == span.events[0].timestamp
    assert row["links"][0]["span_id"] == f"{link.context.span_id:016x}"
    assert row["parent_id"] == f"{span.parent.span_id:016x}"
    assert (row["start_ns"], row["end_ns"]) == (span.start_time, span.end_time)
    assert span_batch([row]).schema.equals(SPAN_SCHEMA)


def test_the_span_says_whose_it_is_before_its_resource_does() -> None:
    resource = {"agentlightning.rollout_id": "ro-r", "agl.attempt_id": "at-r"}
    row = row_of_readable(sdk_span({"agl.rollout_id": "ro-s"}, resource))
    assert (row["rollout_id"], row["attempt_id"], row["resource"]) == ("ro-s", "at-r", {})
    given_ids = row_of_readable(sdk_span(IDS), "ro-g", "at-g", 7)
    assert (given_ids["rollout_id"], given_ids["sequence_id"]) == ("ro-g", 7)
    numbered = row_of_readable(sdk_span({**IDS, "agentlightning.span_sequence_id": 4}))
    assert numbered["sequence_id"] == 4
    with pytest.raises(InputError, match=r"agentlightning\.rollout_id"):
        row_of_readable(sdk_span())


def test_a_span_that_has_not_ended_is_refused() -> None:
    span = TracerProvider().get_tracer("x").start_span("open", attributes=IDS)
    with pytest.raises(InputError, match="has not"):
        row_of_readable(span)


def test_a_reward_annotation_becomes_reward_columns() -> None:
    attributes = {
        **IDS,
        "agentlightning.reward.0.name": "exact",
        "agentlightning.reward.0.value": 0.5,
        "agentlightning.reward.1.name": "style",
        "agentlightning.reward.1.value": 9.0,
        "agentlightning.link.0.key_match": "gen_ai.response.id",
        "agentlightning.link.0.value_match": "chatcmpl-00000000000000aa",
    }
    row = row_of_readable(sdk_span(attributes))
    assert (row["kind"], row["reward"], row["reward_dimension"]) == ("reward", 0.5, "exact")
    assert row["reward_target"] == "00000000000000aa"
    assert row["attributes"]["agentlightning.reward.1.value"] == 9.0
    span = span_of_readable("ro", "at", sdk_span(attributes), 3)
    assert span.extra == {
        "reward": 0.5,
        "reward_dimension": "exact",
        "reward_target": "00000000000000aa",
    }
    assert (span.kind, span.sequence_id, span.rollout_id) == ("reward", 3, "ro")
    unnamed = row_of_readable(sdk_span({**IDS, "agentlightning.reward.0.value": 1}))
    assert (unnamed["reward"], unnamed["reward_dimension"]) == (1.0, "primary")


def test_odd_links_of_a_reward_name_no_call() -> None:
    odd = {
        f"agentlightning.link.{name}.key_match": "span_id" for name in ("007", "9" * 5000, "x", "3")
    }
    row = row_of_readable(sdk_span({**IDS, "agentlightning.reward.0.value": 1, **odd}))
    assert row["reward_target"] is None
    named = odd | {"agentlightning.link.3.value_match": "aa"}
    assert (
        row_of_readable(sdk_span({**IDS, "agentlightning.reward.0.value": 1, **named}))[
            "reward_target"
        ]
        == "aa"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, "high"])
def test_a_reward_that_is_no_number_is_refused_not_stored_as_something_else(value: Any) -> None:
    with pytest.raises(InputError, match=r"reward\.0\.value: expected a finite number"):
        row_of_readable(sdk_span({**IDS, "agentlightning.reward.0.value": value}))


def test_gen_ai_attributes_stay_and_fill_columns() -> None:
    attributes = {
        **IDS,
        "gen_ai.request.model": "m",
        "gen_ai.response.model": "m-2",
        "gen_ai.usage.input_tokens": 12,
        "gen_ai.usage.output_tokens": 2**40,
        "gen_ai.response.finish_reasons": ["stop"],
    }
    row = row_of_readable(sdk_span(attributes))
    assert row["kind"] == "span"
    assert (row["model"], row["prompt_tokens"], row["finish_reason"]) == ("m", 12, "stop")
    assert "response_tokens" not in row  # it does not fit in the column; the attribute has it
    assert row["attributes"]["gen_ai.usage.output_tokens"] == 2**40
    assert row["attributes"]["gen_ai.response.model"] == "m-2"


def test_openinference_names_fill_columns_too() -> None:
    attributes = {
        **IDS,
        "llm.model_name": "m",
        "llm.token_count.prompt": 12,
        "llm.token_count.completion": 3,
        "llm.finish_reason": "stop",
    }
    row = row_of_readable(sdk_span(attributes))
    assert (row["model"], row["prompt_tokens"], row["response_tokens"]) == ("m", 12, 3)
    assert row["finish_reason"] == "stop"


def test_protobuf_values_of_every_type() -> None:
    inner = KeyValueList(values=[KeyValue(key="bytesValue", value=AnyValue(string_value="aGk="))])
    request = wire_span(
        attributes={
            "text": "x",
            "yes": AnyValue(bool_value=True),
            "big": AnyValue(int_value=2**63 - 1),
            "low": AnyValue(int_value=-(2**63)),
            "one": AnyValue(double_value=1.0),
            "nan": AnyValue(double_value=math.nan),
            "down": AnyValue(double_value=-math.inf),
            "raw": AnyValue(bytes_value=b"\xff\x00"),
            "list": AnyValue(
                array_value=ArrayValue(values=[AnyValue(int_value=1), AnyValue(bytes_value=b"b")])
            ),
            "look-alike": AnyValue(kvlist_value=inner),
            "nothing": AnyValue(),
            "empty": AnyValue(kvlist_value=KeyValueList()),
        }
    )
    row = only_row(request)
    found = row["attributes"]
    assert (found["big"], found["low"], found["yes"]) == (2**63 - 1, -(2**63), True)
    assert found["nan"] == {"doubleValue": "NaN"}
    assert found["raw"] == {"bytesValue": "/wA="}
    assert found["list"] == [1, {"bytesValue": "Yg=="}]
    assert found["look-alike"] == {"kvlistValue": {"bytesValue": "aGk="}}
    assert "NaN" not in json.dumps(found, allow_nan=False).replace('"NaN"', "")
    assert original(found["look-alike"]) == {"bytesValue": "aGk="}
    back = request_of_rows([row]).resource_spans[0].scope_spans[0].spans[0]
    sent = request.resource_spans[0].scope_spans[0].spans[0]
    want = {one.key: one.value.SerializeToString() for one in sent.attributes if one.key not in IDS}
    assert {one.key: one.value.SerializeToString() for one in back.attributes} == want


def test_spans_that_cannot_be_stored_are_refused_with_the_reason() -> None:
    nobody = wire_span()
    del nobody.resource_spans[0].scope_spans[0].spans[0].attributes[:]
    assert "agentlightning.rollout_id" in refusal(nobody)
    number = wire_span(attributes={"agentlightning.attempt_id": AnyValue(int_value=1)})
    assert "agentlightning.attempt_id" in refusal(number)
    assert refusal(wire_span(span_id=b"")).startswith("span_id: expected 8 bytes")
    assert refusal(wire_span(trace_id=bytes(16))).startswith("trace_id")
    assert refusal(wire_span(parent_span_id=b"x")).startswith("parent_span_id")
    assert "start_time" in refusal(wire_span(start_time_unix_nano=2**63))
    reward = {"agentlightning.reward.0.value": AnyValue(double_value=math.nan)}
    assert "finite" in refusal(wire_span(attributes=reward))
    both = wire_span()
    both.MergeFrom(nobody)
    parsed = rows_of_request(both)
    assert (len(parsed.rows), len(parsed.refused)) == (1, 1)


def test_json_of_the_protocol() -> None:
    body = {
        "resourceSpans": [
            {
                "resource": {
                    "attributes": [
                        {"key": key, "value": {"stringValue": value}} for key, value in IDS.items()
                    ]
                },
                "scopeSpans": [
                    {
                        "scope": {"name": "s"},
                        "spans": [
                            {
                                "traceId": "5B8EFFF798038103D269B633813FC60C",
                                "spanId": "eee19b7ec3c1b174",
                                "parentSpanId": "",
                                "name": "n",
                                "kind": 2,
                                "startTimeUnixNano": "1544712660000000000",
                                "endTimeUnixNano": 1544712661000000000,
                                "status": {"code": 2, "message": "m"},
                                "unknownField": [1],
                                "attributes": [
                                    {"key": "i", "value": {"intValue": "9007199254740993"}},
                                    {"key": "d", "value": {"doubleValue": "NaN"}},
                                    {"key": "b", "value": {"bytesValue": "/wA="}},
                                ],
                            }
                        ],
                    }
                ],
            }
        ]
    }
    row = only_row(request_of(json.dumps(body).encode(), is_json=True))
    assert row["trace_id"] == "5b8efff798038103d269b633813fc60c"
    assert (row["span_id"], row["parent_id"]) == ("eee19b7ec3c1b174", None)
    assert (row["start_ns"], row["end_ns"]) == (1544712660000000000, 1544712661000000000)
    assert row["status"] == "ERROR"
    assert row["attributes"] == {
        "i": 2**53 + 1,
        "d": {"doubleValue": "NaN"},
        "b": {"bytesValue": "/wA="},
        "otel.span.kind": "SERVER",
        "otel.scope.name": "s",
    }


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b'{"resourceSpans": 3}',
        b'{"resourceSpans": [1]}',
        b'{"resourceSpans": [{"scopeSpans": [{"spans": [{"spanId": "zz"}]}]}]}',
        b'{"resourceSpans": [{"scopeSpans": [{"spans": [{"spanId": 7}]}]}]}',
        b'{"resourceSpans": [{"scopeSpans": [{"spans": [{"startTimeUnixNano": -1}]}]}]}',
        b'{"resourceSpans": NaN}',
        b'{"resourceSpans": ' + b"[" * 100_000,
    ],
)
def test_a_json_body_that_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(InputError, match="ExportTraceServiceRequest in JSON"):
        request_of(body, is_json=True)


def deep(levels: int) -> bytes:
    """A request whose one attribute is a list in a list in a list ... (protobuf's own objects refuse to be built so deep)."""
    value = AnyValue(int_value=1).SerializeToString()
    for _ in range(levels):
        value = field(5, field(1, value))
    attribute = field(1, b"deep") + field(2, value)
    ids = b"".join(
        field(9, KeyValue(key=key, value=AnyValue(string_value=text)).SerializeToString())
        for key, text in IDS.items()
    )
    span = field(1, b"t" * 16) + field(2, b"s" * 8) + ids + field(9, attribute)
    return field(1, field(2, field(2, span)))


def field(number: int, content: bytes) -> bytes:
    size, head = len(content), bytearray([number << 3 | 2])
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    return bytes([*head, size]) + content


def test_a_protobuf_body_that_is_no_request_is_refused() -> None:
    for body in (b"\x0a\xff\xff", b"{}", b"\xff" * 40):
        with pytest.raises(InputError, match="in protobuf"):
            request_of(body, is_json=False)
    with pytest.raises(InputError, match="in protobuf"):
        request_of(deep(200), is_json=False)
    row = only_row(request_of(deep(20), is_json=False))
    assert json.dumps(row["attributes"]["deep"]) == "[" * 20 + "1" + "]" * 20


def test_our_own_rows_go_out_with_what_other_programs_read() -> None:
    call = {
        "rollout_id": "ro-1",
        "attempt_id": "at-1",
        "sequence_id": 5,
        "span_id": "aaaaaaaaaaaaaaaa",
        "name": "model.call",
        "kind": "call",
        "start_ns": 1,
        "end_ns": 2,
        "status": "OK",
        "role": "planner",
        "model": "m",
        "attributes": {"response": {"role": "assistant"}},
        "prompt_ids": [1, 2],
        "response_ids": [3],
        "response_logprobs": [-0.5],
        "weight_versions": [(0, 4)],
        "prompt_tokens": 2,
        "response_tokens": 1,
        "finish_reason": "stop",
    }
    reward = {
        **{key: call[key] for key in ("rollout_id", "attempt_id", "start_ns", "end_ns", "status")},
        "span_id": "not-hex",
        "parent_id": "aaaaaaaaaaaaaaaa",
        "name": "r",
        "kind": "reward",
        "reward": 1.0,
        "reward_dimension": "primary",
        "events": [{"name": "by hand"}, "text"],
    }
    request = request_of_rows([call, reward])
    (group,) = request.resource_spans
    assert {one.key: one.value.string_value for one in group.resource.attributes} == IDS
    first, second = group.scope_spans[0].spans
    assert first.trace_id == second.trace_id
    assert second.parent_span_id == first.span_id
    assert len(second.span_id) == 8
    found = {one.key: one.value for one in first.attributes}
    assert found["gen_ai.request.model"].string_value == "m"
    assert found["gen_ai.usage.input_tokens"].int_value == 2
    assert found["agentlightning.span_sequence_id"].int_value == 5
    assert not {name for name in found if name.endswith("_ids")}
    rows = rows_of_request(request).rows
    assert (rows[0]["role"], rows[0]["model"], rows[0]["kind"]) == ("planner", "m", "span")
    assert (rows[1]["kind"], rows[1]["reward"]) == ("reward", 1.0)
    large = request_of_rows([call], token_ids=True).resource_spans[0].scope_spans[0].spans[0]
    tokens = {one.key: one.value for one in large.attributes}
    assert [one.int_value for one in tokens["agl.prompt_ids"].array_value.values] == [1, 2]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=True, width=64)
    | TEXT
    | st.binary(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            TEXT | st.sampled_from(["bytesValue", "doubleValue", "kvlistValue"]), inner, max_size=2
        )
    ),
    max_leaves=6,
)


def same(left: Any, right: Any) -> bool:
    """Equality in which NaN equals itself and 1 is not 1.0 and not True."""
    if isinstance(left, dict):
        return (
            isinstance(right, dict)
            and left.keys() == right.keys()
            and all(same(left[key], right[key]) for key in left)
        )
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and (left == right or (left != left and right != right))


@given(VALUES)
def test_every_value_survives_as_json(value: Any) -> None:
    text = json.dumps(plain(value), allow_nan=False)
    assert same(original(json.loads(text)), value)


@settings(max_examples=60)
@given(
    attributes=st.dictionaries(TEXT, VALUES, max_size=3),
    resource=st.dictionaries(TEXT, VALUES, max_size=2),
    event=VALUES,
    name=TEXT,
    kind=st.sampled_from(WireSpan.SpanKind.values()[1:]),
    code=st.sampled_from([0, 1, 2]),
    scope=TEXT,
)
def test_a_row_goes_out_as_it_came_in(
    attributes: dict[str, Any],
    resource: dict[str, Any],
    event: Any,
    name: str,
    kind: Any,
    code: int,
    scope: str,
) -> None:
    made = {
        "rollout_id": "ro-1",
        "attempt_id": "at-1",
        "trace_id": "ab" * 16,
        "span_id": "cd" * 8,
        "parent_id": "ef" * 8,
        "name": name,
        "kind": "span",
        "start_ns": 2**62,
        "end_ns": 2**62 + 1,
        "status": ["UNSET", "OK", "ERROR"][code],
        "attributes": plain_items(attributes),
        "resource": plain_items(resource),
        "events": [{"name": name, "time_ns": 3, "attributes": {"e": plain(event)}}],
        "links": [{"trace_id": "12" * 16, "span_id": "34" * 8, "attributes": {}}],
    }
    request = request_of_rows([made])
    span = request.resource_spans[0].scope_spans[0].spans[0]
    span.kind = kind
    request.resource_spans[0].scope_spans[0].scope.name = scope
    row = only_row(request_of(request.SerializeToString(), is_json=False))
    again = request_of_rows([row])
    assert same(only_row(again), row)
    # Through JSON too, whose ids are hexadecimal.
    text = json_format.MessageToDict(again)
    for one in (text["resourceSpans"][0]["scopeSpans"][0]["spans"][0],):
        one.update(traceId="ab" * 16, spanId="cd" * 8, parentSpanId="ef" * 8)
        one["links"][0].update(traceId="12" * 16, spanId="34" * 8)
    assert same(only_row(request_of(json.dumps(text).encode(), is_json=True)), row)
    assert span_batch([row]).num_rows == 1


def plain_items(items: dict[str, Any]) -> dict[str, Any]:
    return {key: plain(value) for key, value in items.items()}
