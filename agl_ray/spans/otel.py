"""OpenTelemetry spans as rows of SPAN_SCHEMA: whose span it is, what it rewards, which model call it describes.

What it is: `row_of` makes a row of a span's parts, `row_of_readable` of a finished span of the OpenTelemetry SDK, `span_of_readable`
the same as a `Span` record; `agl_ray.spans.otlp` reads and writes the protocol. In a row:

* ids come from the span's attributes, else from its resource: `agentlightning.rollout_id`, `.attempt_id` (or `agl.` instead of
  `agentlightning.`). They become columns and leave the attributes. `agentlightning.span_sequence_id` is read and stays;
* `agentlightning.reward.0.value` and `.name` (number 0 is the primary reward) become the reward columns, kind `reward`; a primary reward
  that is no finite number refuses the span. A link of agent-lightning (`agentlightning.link.<i>.key_match` / `.value_match`) says what is
  rewarded, in `reward_target`: by `span_id` or `gen_ai.response.id` a call, by `agentlightning.tag.<i>` a tag (`tag:NAME`), by
  `agl.role` a role (`role:NAME`), by `agl.turn` the N-th call of the attempt (`turn:N`); without one it is the rollout;
* `gen_ai.*` attributes, and OpenInference's `llm.*`, stay and fill model, finish reason and usage. Such a span is of kind `span`: only the gateway records `call`;
* what a row has no column for is kept as attributes: `otel.span.kind`, `otel.scope.name`, `otel.scope.version`, `otel.trace_state`, `otel.dropped_*_count`.

Attribute values are JSON values, see `agl_ray.spans.otel_values`. Events are `{name, time_ns, attributes}`, links `{trace_id, span_id, attributes}`.
Who calls it: `agl_ray.spans.otlp`, `LightningStore.add_otel_span`. Test alone: tests/unit/test_spans_otel.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from agl_ray.spans.otel_values import clean, plain
from agl_ray.spans.schema import KIND_REWARD, KIND_SPAN, SPAN_SCHEMA
from agl_ray.types import InputError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

    from agl_ray.types.span import Span

ROLLOUT_ID = "agentlightning.rollout_id"
ATTEMPT_ID = "agentlightning.attempt_id"
SEQUENCE_ID = "agentlightning.span_sequence_id"
REWARD_VALUE = "agentlightning.reward.0.value"
REWARD_NAME = "agentlightning.reward.0.name"
ROLE = "agl.role"
TURN = "agl.turn"
_PARTS = {ROLE: "role", TURN: "turn"}  # of a rollout, as a reward's link may name them

SPAN_KIND = "otel.span.kind"
SCOPE_NAME = "otel.scope.name"
SCOPE_VERSION = "otel.scope.version"
TRACE_STATE = "otel.trace_state"
SCHEMA_URL = "otel.schema_url"  # in a resource
DROPPED = {
    "attributes": "otel.dropped_attributes_count",
    "events": "otel.dropped_events_count",
    "links": "otel.dropped_links_count",
}

MODEL = ("gen_ai.request.model", "gen_ai.response.model", "llm.model_name")
PROMPT_TOKENS = (
    "gen_ai.usage.input_tokens",
    "gen_ai.usage.prompt_tokens",
    "llm.token_count.prompt",
)
RESPONSE_TOKENS = (
    "gen_ai.usage.output_tokens",
    "gen_ai.usage.completion_tokens",
    "llm.token_count.completion",
)
FINISH_REASONS = "gen_ai.response.finish_reasons"
FINISH_REASON = "llm.finish_reason"

_IDS = {
    "rollout_id": (ROLLOUT_ID, "agl.rollout_id"),
    "attempt_id": (ATTEMPT_ID, "agl.attempt_id"),
}
_ID_NAMES = frozenset(name for names in _IDS.values() for name in names)
_LINK = re.compile(r"agentlightning\.link\.(0|[1-9][0-9]{0,8})\.key_match")
_OUR_ANSWER = re.compile(
    "^(chatcmpl-|cmpl-|resp_|msg_)"
)  # the gateway's response id is this and the call's span id
_TAG = re.compile(r"agentlightning\.tag\.[0-9]+")
_MOST_INT32, _MOST_INT64 = 2**31 - 1, 2**63 - 1


def ids_of(
    attributes: Mapping[str, Any], resource: Mapping[str, Any]
) -> tuple[str | None, str | None, int | None]:
    """(rollout id, attempt id, sequence id) that a span names; None where it names none, or one that is no text or no
    positive integer."""
    found: list[str | None] = []
    for names in _IDS.values():
        given = (source.get(name) for source in (attributes, resource) for name in names)
        found.append(next((one for one in given if isinstance(one, str) and one), None))
    sequences = (source.get(SEQUENCE_ID) for source in (attributes, resource))
    sequence = next((one for one in sequences if _is_int(one, _MOST_INT64) and one), None)
    return found[0], found[1], sequence


def row_of(
    *,
    rollout_id: str,
    attempt_id: str,
    span_id: str,
    name: str,
    start_ns: int,
    end_ns: int,
    attributes: Mapping[str, Any],
    resource: Mapping[str, Any],
    **columns: Any,
) -> dict[str, Any]:
    """A row of SPAN_SCHEMA. Attribute values are plain (`otel_values`); `columns` are further ones. InputError says what
    is wrong with the span."""
    for column, value in (("start_time", start_ns), ("end_time", end_ns)):
        if not _is_int(value, _MOST_INT64):
            raise InputError(
                f"span {span_id}: {column}: expected nanoseconds since the epoch, got {value!r}"
            )
    kept = {key: value for key, value in attributes.items() if key not in _ID_NAMES}
    role = kept.pop(ROLE, None)
    return {
        "rollout_id": rollout_id,
        "attempt_id": attempt_id,
        "span_id": span_id,
        "name": name,
        "kind": KIND_SPAN,
        "start_ns": start_ns,
        "end_ns": end_ns,
        "role": None if role is None else str(role),
        "attributes": kept,
        "resource": {key: value for key, value in resource.items() if key not in _ID_NAMES},
        **columns,
        **columns_of(span_id, kept),
    }


def columns_of(span_id: str, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that attributes fill: of a model call, of a reward. InputError for a reward that is none."""
    return {**_model_call(attributes), **_reward(span_id, attributes)}


def _model_call(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of a model call, from the `gen_ai.*` attributes that fit."""
    models = (attributes.get(key) for key in MODEL)
    reasons = [*_list(attributes.get(FINISH_REASONS)), attributes.get(FINISH_REASON)]
    columns = {
        "model": next((one for one in models if isinstance(one, str)), None),
        "finish_reason": next((one for one in reasons if isinstance(one, str)), None),
        "prompt_tokens": _count(attributes, PROMPT_TOKENS),
        "response_tokens": _count(attributes, RESPONSE_TOKENS),
    }
    return {name: value for name, value in columns.items() if value is not None}


def _reward(span_id: str, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of the primary reward, where the span carries one."""
    if REWARD_VALUE not in attributes:
        return {}
    value = attributes[REWARD_VALUE]
    if not isinstance(value, bool | int | float) or not math.isfinite(value):
        raise InputError(
            f"span {span_id}: {REWARD_VALUE}: expected a finite number, got {value!r}; it is no reward"
        )
    name = attributes.get(REWARD_NAME)
    return {
        "kind": KIND_REWARD,
        "reward": float(value),
        "reward_dimension": name if isinstance(name, str) else "primary",
        "reward_target": _target(attributes),
    }


def _target(attributes: Mapping[str, Any]) -> str | None:
    """What agent-lightning's links name, if they name something: the span id of a call, `tag:NAME`, `role:NAME` or `turn:N`."""
    numbers = (_LINK.fullmatch(key) for key in attributes)
    for number in sorted(int(match[1]) for match in numbers if match):
        link = f"agentlightning.link.{number}"
        key, value = attributes[f"{link}.key_match"], attributes.get(f"{link}.value_match")
        if isinstance(value, str) and key == "span_id":
            return value
        if isinstance(value, str) and key == "gen_ai.response.id":
            return _OUR_ANSWER.sub("", value)
        if isinstance(value, str) and isinstance(key, str) and _TAG.fullmatch(key):
            return f"tag:{value}"
        if isinstance(value, str) and key in _PARTS:
            return f"{_PARTS[key]}:{value}"
    return None


def _count(attributes: Mapping[str, Any], names: Iterable[str]) -> int | None:
    values = (attributes.get(name) for name in names)
    return next((one for one in values if _is_int(one, _MOST_INT32)), None)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_int(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


# The SDK.


def row_of_readable(
    span: ReadableSpan,
    rollout_id: str | None = None,
    attempt_id: str | None = None,
    sequence_id: int | None = None,
) -> dict[str, Any]:
    """The row of a span that has ended. Ids that are not given are read from the span; InputError where there are none."""
    attributes = _attributes(span.attributes) | _beside(span)
    resource = _attributes(span.resource.attributes if span.resource else None)
    if span.resource and span.resource.schema_url:
        resource[SCHEMA_URL] = span.resource.schema_url
    named = ids_of(attributes, resource)
    rollout_id, attempt_id = rollout_id or named[0], attempt_id or named[1]
    context = span.context
    if context is None or span.start_time is None or span.end_time is None:
        raise InputError(f"span {span.name!r}: expected one that has ended, got one that has not")
    if rollout_id is None or attempt_id is None:
        raise InputError(
            f"span {span.name!r}: expected rollout and attempt id in the call or as attributes {ROLLOUT_ID} and "
            f"{ATTEMPT_ID} of the span or its resource, got {rollout_id!r} and {attempt_id!r}"
        )
    return row_of(
        rollout_id=rollout_id,
        attempt_id=attempt_id,
        sequence_id=named[2] if sequence_id is None else sequence_id,
        trace_id=f"{context.trace_id:032x}",
        span_id=f"{context.span_id:016x}",
        parent_id=None if span.parent is None else f"{span.parent.span_id:016x}",
        name=clean(span.name),
        start_ns=span.start_time,
        end_ns=span.end_time,
        status=span.status.status_code.name,
        status_message=clean(span.status.description) if span.status.description else None,
        attributes=attributes,
        resource=resource,
        events=[
            {
                "name": clean(event.name),
                "time_ns": event.timestamp,
                "attributes": _attributes(event.attributes),
            }
            for event in span.events
        ],
        links=[
            {
                "trace_id": f"{link.context.trace_id:032x}",
                "span_id": f"{link.context.span_id:016x}",
                "attributes": _attributes(link.attributes),
            }
            for link in span.links
        ],
    )


def span_of_readable(
    rollout_id: str, attempt_id: str, span: ReadableSpan, sequence_id: int | None = None
) -> Span:
    """As `row_of_readable`, as a record: times in seconds, call and reward columns in `extra`."""
    from agl_ray.spans.objects import span_object

    row = row_of_readable(span, rollout_id, attempt_id, sequence_id)
    return span_object(dict.fromkeys(SPAN_SCHEMA.names) | row)


def _attributes(given: Mapping[str, Any] | None) -> dict[str, Any]:
    return {clean(str(key)): plain(value) for key, value in (given or {}).items()}


def _beside(span: ReadableSpan) -> dict[str, Any]:
    """What a row has no column for, as attributes; nothing where it is the usual."""
    scope, context = span.instrumentation_scope, span.context
    counts = {name: getattr(span, f"dropped_{name}") for name in DROPPED}
    given = {
        SPAN_KIND: span.kind.name if span.kind.name != "INTERNAL" else None,
        SCOPE_NAME: scope.name if scope else None,
        SCOPE_VERSION: scope.version if scope else None,
        TRACE_STATE: context.trace_state.to_header() if context else None,
        **{DROPPED[name]: number for name, number in counts.items()},
    }
    return {name: value for name, value in given.items() if value}
