"""Emitters: what an agent may say about itself while it runs, in the words of agent-lightning 0.3.

    emit_reward(1.0)                                               for the rollout
    emit_reward({"right": 1.0, "short": 0.2}, primary_key="right") several dimensions
    emit_reward(0.5, call_id=answer.id)                            for one model call
    emit_reward(0.5, tag="search")                                 for the calls whose request has the tag, see below
    emit_reward(0.5, role="planner")   emit_reward(0.5, turn=2)    for the calls of a role, for the second call
    emit_message("tool timed out")   emit_object(state)   emit_exception(error)   emit_annotation({"phase": "plan"})

A reward is a row of kind `reward` with the columns `reward`, `reward_dimension` (name of the primary one) and `reward_target`: null for
the rollout, the span id of a call, `tag:NAME`, `role:NAME` or `turn:N`; further dimensions are attributes `agentlightning.reward.<i>.name` /
`.value`. A call is tagged in its request: `metadata=make_tag_attributes(["search"])` (OpenAI's field of this name).
Each emitter returns the span. Outside of a rollout an emitter raises RuntimeError, as agent-lightning's do; with `propagate=False` it
only returns the span, anywhere.

Who calls it: agents, as `agl.emit_*`. Test alone: tests/unit/test_tracing_emit.py.
"""

from __future__ import annotations

import base64
import time
import traceback
from collections.abc import Mapping
from typing import Any

import msgspec

from agl_ray.spans import new_span_id
from agl_ray.spans.objects import span_object
from agl_ray.spans.otel import ROLE, TURN, row_of
from agl_ray.spans.otel_values import clean
from agl_ray.spans.schema import SPAN_SCHEMA
from agl_ray.tracing import names
from agl_ray.tracing.recorder import current_recorder
from agl_ray.tracing.values import finite_reward, flatten, to_json
from agl_ray.types import InputError, Span

_NOTHING = dict.fromkeys(SPAN_SCHEMA.names)


def emit_reward(
    reward: float | Mapping[str, float],
    *,
    primary_key: str | None = None,
    call_id: str | None = None,
    tag: str | None = None,
    role: str | None = None,
    turn: int | None = None,
    attributes: Mapping[str, Any] | None = None,
    propagate: bool = True,
) -> Span:
    """Record a reward for the running rollout; the last one without a target is the rollout's when the agent returns None.

    reward: a number, or numbers by dimension, of which `primary_key` names the one that trains. call_id: the reward is for the model
    call whose answer had this id (of any dialect). tag, role, turn (from 1): it is for the calls with this tag, of this role, for the call of
    this number. ValueError for anything that is not a finite number (a NaN is a bug of the agent's, never a reward); InputError where
    the arguments contradict each other.
    """
    given: dict[str, Any] = {names.REWARD: _dimensions(reward, primary_key), **(attributes or {})}
    targets = {"gen_ai.response.id": call_id, f"{names.TAG}.0": tag, ROLE: role, TURN: turn}
    return emit_annotation(given | _linked(given, targets), propagate)


def _dimensions(reward: Any, primary_key: str | None) -> list[dict[str, Any]]:
    if not isinstance(reward, Mapping):
        if primary_key is not None:
            raise InputError("emit_reward: primary_key goes with a dictionary of rewards only")
        return [{"name": "primary", "value": finite_reward(reward)}]
    if primary_key not in reward:
        raise InputError(
            f"emit_reward: primary_key: expected one of {[*reward]}, got {primary_key!r}"
        )
    ordered = [primary_key, *(name for name in reward if name != primary_key)]
    return [{"name": str(name), "value": finite_reward(reward[name])} for name in ordered]


def _linked(given: Mapping[str, Any], targets: Mapping[str, Any]) -> dict[str, Any]:
    named = {key: value for key, value in targets.items() if value is not None}
    if not named:
        return {}
    if len(named) > 1 or any(str(name).startswith(f"{names.LINK}.") for name in given):
        raise InputError(
            "emit_reward: expected one of call_id, tag, role, turn and links in attributes, got several"
        )
    ((key, value),) = named.items()
    is_turn = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if not is_turn if key == TURN else not (isinstance(value, str) and value):
        wanted = "a number from 1" if key == TURN else "text"
        raise InputError(f"emit_reward: expected its target as {wanted}, got {value!r}")
    return names.make_link_attributes({key: str(value)})


def emit_annotation(annotation: Mapping[str, Any], propagate: bool = True) -> Span:
    """Record attributes: nested maps and lists are flattened to dotted names."""
    return _emit(names.ANNOTATION_SPAN, _flat(annotation), propagate)


def emit_message(
    message: str, attributes: Mapping[str, Any] | None = None, propagate: bool = True
) -> Span:
    """Record a text. InputError where it is none."""
    if not isinstance(message, str):
        raise InputError(
            f"emit_message: expected text, got {type(message).__name__}; use emit_object"
        )
    body = {names.MESSAGE_BODY: clean(message)}
    return _emit(names.MESSAGE_SPAN, {**body, **_flat(attributes)}, propagate)


def emit_object(
    object: Any, attributes: Mapping[str, Any] | None = None, propagate: bool = True
) -> Span:
    """Record an object: text, numbers and bytes (base64) as a literal, the rest as JSON. InputError where it has no JSON form."""
    content = {names.OBJECT_TYPE: _type_name(object)}
    if isinstance(object, str | bool | int | float):
        content[names.OBJECT_LITERAL] = clean(str(object))
    elif isinstance(object, bytes | bytearray | memoryview):
        content[names.OBJECT_LITERAL] = base64.b64encode(bytes(object)).decode()
    else:
        content[names.OBJECT_JSON] = msgspec.json.encode(to_json(object)).decode()
    return _emit(names.OBJECT_SPAN, {**content, **_flat(attributes)}, propagate)


def emit_exception(
    exception: BaseException, attributes: Mapping[str, Any] | None = None, propagate: bool = True
) -> Span:
    """Record an exception that the agent has dealt with, with its traceback. The span's status is ERROR; the attempt goes on."""
    if not isinstance(exception, BaseException):
        raise InputError(f"emit_exception: expected an exception, got {type(exception).__name__}")
    event = exception_event(exception)
    content = {**event["attributes"], **_flat(attributes)}
    status = {"status": "ERROR", "status_message": clean(str(exception))}
    return _emit(names.EXCEPTION_SPAN, content, propagate, events=[event], **status)


def exception_event(exception: BaseException) -> dict[str, Any]:
    """An exception as an event of a span, by OpenTelemetry's names."""
    return {
        "name": "exception",
        "time_ns": time.time_ns(),
        "attributes": {
            "exception.type": _type_name(exception),
            "exception.message": clean(str(exception)),
            "exception.stacktrace": clean("".join(traceback.format_exception(exception))),
        },
    }


def _emit(name: str, attributes: dict[str, Any], propagate: bool, **columns: Any) -> Span:
    recorder = current_recorder() if propagate else None
    now = time.time_ns()
    if recorder is not None:
        above, columns["parent_id"] = recorder.parent()
        columns["trace_id"] = f"{above.trace_id:032x}"
    row = row_of(
        rollout_id=recorder.rollout_id if recorder else "",
        attempt_id=recorder.attempt_id if recorder else "",
        span_id=new_span_id(),
        name=name,
        start_ns=now,
        end_ns=now,
        attributes=attributes,
        resource={},
        **{"status": "OK", **columns},
    )
    if recorder is not None:
        recorder.add_row(row)
    return span_object(_NOTHING | row)


def _flat(attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    return flatten(attributes, "") if attributes else {}


def _type_name(thing: Any) -> str:
    kind = type(thing)
    return (
        kind.__qualname__
        if kind.__module__ == "builtins"
        else f"{kind.__module__}.{kind.__qualname__}"
    )
