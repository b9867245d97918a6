"""A call as a span, and back: what the gateway writes to the store, and how a session is rebuilt from it.

Called by: the door. A call span holds the exact ids in suffix form (`parent_call`, `parent_tokens`, spans/schema.py) and in its
attributes, as JSON: `request` {messages from `messages_from` on, tools, sampling, metadata, template options}, `response` (the message
returned), `agl.session` (text of the new part of the prompt, raw text of the response, where it continues its parent), `agl.timings`
(seconds), `agl.retokenized_tokens`, `agl.cached_tokens` (of the prompt, found in the engine's prefix cache), for a branch `agl.branch_reason`, `agl.constrained` (constrained.py), `agl.overlong` where the prompt was cut (overlong.py),
`agl.role_kind` (frozen | endpoint) where the role is not trained, and `agl.kept` where a later call may name this one as the one
it goes on from (the responses dialect). A raw prompt has no messages: its text is in `agl.session`. A call that a model outside answered has no ids
and no `agl.session`: `agl.token_ids` says so, and `agl.endpoint` who answered. A gateway that was restarted reads these spans and
goes on exactly. Test alone: `pytest tests/unit/test_gateway_door.py`.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import pyarrow as pa

from agl_ray.gateway.caller import CallPath
from agl_ray.gateway.calls import Call, Point, message_key, thoughts, tool_ids
from agl_ray.gateway.canonical import CallRequest, CallResult, as_history
from agl_ray.gateway.session import Plan, Session
from agl_ray.spans import KIND_CALL, KIND_SPAN, ROLE_KIND, JsonText, new_span_id, span_batch

CALL_NAME = "model.call"
FAILED_CALL_NAME = "model.call.failed"
REFUSED_CALL_NAME = "model.call.refused"
COUNTED = (
    *("calls", "outside_calls", "engine_errors", "refused_calls"),
    *("response_tokens", "retokenized_tokens", "branches", "overlong_cuts", "cached_tokens"),
)
NO_IDS = "none: a model outside answered, and gives no token ids"


def call_span(
    *,
    path: CallPath,
    request: CallRequest,
    sampling: Mapping[str, Any],
    result: CallResult,
    plan: Plan,
    body_text: str,
    end_text: str,
    start_ns: int,
    end_ns: int,
    timings: Mapping[str, float],
    notes: Mapping[str, Any],
) -> pa.RecordBatch:
    """The batch of one row that records a finished call. `sampling` is what the engine was given, `notes` further attributes."""
    first = plan.shared_messages
    attributes: dict[str, Any] = {
        "request": {
            "messages_from": first,
            "messages": request.messages[first:],
            "tools": request.tools
            if plan.parent is None or plan.parent.tools != plan.tools
            else None,
            "sampling": dict(sampling),
            "metadata": request.metadata,
            "template": template_asked(request),
        },
        "response": result.message(),
        "agl.session": {
            "point": plan.point,
            "rest": plan.rest_text,
            "body": body_text,
            "end": end_text,
            "messages": plan.num_messages,
            "chain": plan.chain,
            "tools": plan.tools,
            "before": [call.call_id for call in plan.before],
        },
        "agl.timings": dict(timings),
        "agl.retokenized_tokens": plan.retokenized,
        "agl.cached_tokens": result.cached_tokens,
        **notes,
    }
    if plan.branch_reason is not None:
        attributes["agl.branch_reason"] = plan.branch_reason
    return _call_batch(
        request,
        result,
        attributes,
        **_place(path),
        start_ns=start_ns,
        end_ns=end_ns,
        parent_call=plan.parent.call_id if plan.parent else None,
        parent_tokens=plan.parent_tokens,
        prompt_ids=plan.rest_ids,
        response_ids=result.response_ids,
        response_logprobs=result.logprobs,
        weight_versions=result.weight_versions,
        prompt_tokens=len(plan.prompt_ids),
        response_tokens=len(result.response_ids),
    )


def outside_span(
    *,
    path: CallPath,
    request: CallRequest,
    result: CallResult,
    endpoint: Mapping[str, Any],
    start_ns: int,
    end_ns: int,
) -> pa.RecordBatch:
    """A finished call that a model outside answered: its messages, and no ids."""
    attributes: dict[str, Any] = {
        "request": {
            "messages_from": 0,
            "messages": request.messages,
            "tools": request.tools,
            "sampling": request.sampling,
            "metadata": request.metadata,
            "template": template_asked(request),
        },
        "response": result.message(),
        ROLE_KIND: "endpoint",
        "agl.endpoint": dict(endpoint),
        "agl.token_ids": NO_IDS,
        "agl.timings": {"endpoint": (end_ns - start_ns) / 1e9},
    }
    return _call_batch(
        request,
        result,
        attributes,
        **_place(path),
        start_ns=start_ns,
        end_ns=end_ns,
        prompt_tokens=result.num_prompt,
        response_tokens=result.num_response,
    )


def _call_batch(
    request: CallRequest, result: CallResult, attributes: dict[str, Any], **columns: Any
) -> pa.RecordBatch:
    """The row of an answered call: what every such call has, with its own columns."""
    if request.constraint:
        attributes["agl.constrained"] = next(iter(request.constraint))
    if request.keep:
        attributes["agl.kept"] = {"instructions": request.instructions}
    row = {
        "span_id": result.call_id,
        "name": CALL_NAME,
        "kind": KIND_CALL,
        "status": "OK",
        "attributes": _json_texts(attributes),
        "model": request.model,
        "dialect": request.dialect,
        "finish_reason": result.finish_reason,
        **columns,
    }
    return span_batch([row])


def unanswered_span(
    name: str,
    *,
    path: CallPath,
    message: str,
    start_ns: int,
    end_ns: int,
) -> pa.RecordBatch:
    """A call that failed or was refused (`name`): a plain span, so that nobody takes it for tokens."""
    row = {
        **_place(path),
        "span_id": new_span_id(),
        "name": name,
        "kind": KIND_SPAN,
        "start_ns": start_ns,
        "end_ns": end_ns,
        "status": "ERROR",
        "status_message": message,
    }
    return span_batch([row])


def _place(path: CallPath) -> dict[str, Any]:
    """The columns that say whose call it was: the attempt's, and a child of the span that it was made in."""
    place = {"rollout_id": path.rollout_id, "attempt_id": path.attempt_id, "role": path.role}
    return place if path.caller is None else {**place, **path.caller._asdict()}


def _json_texts(attributes: Mapping[str, Any]) -> dict[str, JsonText]:
    """Attributes of a call, which may hold a whole prompt, written in a seventh of the standard library's time."""
    return {key: JsonText(msgspec.json.encode(value).decode()) for key, value in attributes.items()}


def rebuild(rows: Iterable[Mapping[str, Any]], role: str | None) -> Session:
    """The session that the recorded calls of this role amount to; `rows` are the attempt's spans in sequence order.

    ValueError where a call continues one that is not among the rows.
    """
    session = Session()
    for row in rows:
        if row["kind"] != KIND_CALL or row["role"] != role:
            continue
        attributes = dict(row["attributes"])
        if "agl.session" not in attributes:
            continue  # a model outside answered
        kept, message = _value(attributes["agl.session"]), _value(attributes["response"])
        parent = session.known(row["parent_call"]) if row["parent_call"] else None
        session.remember(
            Call(
                call_id=row["span_id"],
                parent=parent,
                point=Point(kept["point"]) if kept["point"] else None,
                rest_text=kept["rest"],
                rest_ids=array("i", row["prompt_ids"]),
                body_text=kept["body"],
                end_text=kept["end"],
                response_ids=array("i", row["response_ids"]),
                key=message_key(message),
                tool_ids=tool_ids(message),
                reasoning=thoughts(message),
                num_messages=kept["messages"],
                chain=kept["chain"],
                tools=kept["tools"],
                num_prompt_ids=row["prompt_tokens"],
                before=tuple(session.known(name) for name in kept.get("before", ())),
            )
        )
    return session


def kept_conversations(
    rows: Iterable[Mapping[str, Any]], role: str | None
) -> dict[str, list[dict[str, Any]]]:
    """Call id -> the conversation up to and with its answer, of the calls of this role that may be named by later ones."""
    asked: dict[str, list[dict[str, Any]]] = {}
    kept: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["kind"] != KIND_CALL or row["role"] != role:
            continue
        attributes = dict(row["attributes"])
        request = _value(attributes["request"])
        before = asked.get(row["parent_call"] or "", [])[: request["messages_from"]]
        asked[row["span_id"]] = messages = [*before, *request["messages"]]
        if "agl.kept" in attributes:
            first = 1 if _value(attributes["agl.kept"])["instructions"] else 0
            answer = as_history(_value(attributes["response"]))
            kept[row["span_id"]] = [*messages[first:], answer]
    return kept


def template_asked(request: CallRequest) -> dict[str, Any]:
    """The template options that a request asked for."""
    thinking = {} if request.thinking is None else {"thinking": request.thinking}
    return {**request.template, **thinking}


def counters(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """What the attempt's spans, all roles, add up to: calls answered (of these by models outside), failed and refused, response tokens,
    retokenized tokens, branches, prompts that were cut. Of refused calls the first of each reason has a span."""
    found = dict.fromkeys(COUNTED, 0)
    for row in rows:
        found["engine_errors"] += row["name"] == FAILED_CALL_NAME
        found["refused_calls"] += row["name"] == REFUSED_CALL_NAME
        if row["kind"] == KIND_CALL:
            attributes = dict(row["attributes"])
            found["calls"] += 1
            found["outside_calls"] += "agl.session" not in attributes
            found["response_tokens"] += row["response_tokens"] or 0
            found["retokenized_tokens"] += int(
                _value(attributes.get("agl.retokenized_tokens", "0"))
            )
            found["cached_tokens"] += int(_value(attributes.get("agl.cached_tokens", "0")))
            found["branches"] += "agl.branch_reason" in attributes
            found["overlong_cuts"] += "agl.overlong" in attributes
    return found


def _value(stored: Any) -> Any:
    """Attribute values are JSON text in Arrow; `query_span_rows` of some transports hands them out decoded."""
    return json.loads(stored) if isinstance(stored, str) else stored
