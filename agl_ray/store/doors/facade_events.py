"""Events of agent-lightning 1.0 as spans, and the spans of an attempt as its events.

What it is: a posted event is a span whose attributes hold its type and data; a `reward` event is a reward span too, with its value in
the reward column. Read back, a model call recorded by our gateway is a `model_request` event with whole prompts and token ids, a reward from
anywhere is a `reward` event; other spans are not shown. `triplet` trims events to what 1.0's trainer reads.
Who calls it: `agl_ray.store.doors.facade`. Test alone: tests/unit/test_store_facade.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from agl_ray.gateway.record import FAILED_CALL_NAME
from agl_ray.spans import KIND_CALL, KIND_REWARD, KIND_SPAN, new_span_id
from agl_ray.types import InputError

TYPE, DATA = "agl.event.type", "agl.event.data"
REQUEST, REWARD = "model_request", "reward"
REWARD_ATTRIBUTE = "agentlightning.reward.0.value"


class EventCreate(msgspec.Struct):
    """Body of POST .../events."""

    event_type: str
    data: dict[str, Any] = {}


class Event(msgspec.Struct):
    event_type: str
    rollout_id: str
    attempt_id: str
    timestamp: float
    data: dict[str, Any]


def event_row(event: EventCreate, rollout_id: str, attempt_id: str) -> dict[str, Any]:
    """The event as a row of SPAN_SCHEMA. InputError for a reward whose `data.value` is no finite number: a failure is never a reward."""
    now = time.time_ns()
    attributes: dict[str, Any] = {TYPE: event.event_type, DATA: event.data}
    row: dict[str, Any] = {
        "rollout_id": rollout_id,
        "attempt_id": attempt_id,
        "span_id": new_span_id(),
        "name": event.event_type,
        "kind": KIND_SPAN,
        "start_ns": now,
        "end_ns": now,
        "status": "OK",
        "attributes": attributes,
    }
    if event.event_type == REWARD:
        value = event.data.get("value")
        if not isinstance(value, bool | int | float) or not math.isfinite(value):
            raise InputError(
                f"data.value of a reward event: expected a finite number, got {value!r}"
            )
        attributes[REWARD_ATTRIBUTE] = float(value)
        row |= {"kind": KIND_REWARD, "reward": float(value), "reward_dimension": "primary"}
    return row


def events_of(rows: Iterable[Mapping[str, Any]], attempt_id: str) -> list[Event]:
    """The events in an attempt's spans (decoded rows in order of sequence); `attempt_id` as the wire calls it."""
    calls = _Calls()
    events: list[Event] = []
    for row in rows:
        attributes = row["attributes"] or {}
        if TYPE in attributes:
            kind, data = attributes[TYPE], attributes[DATA]
        elif row["kind"] == KIND_CALL:
            kind, data = REQUEST, calls.data_of(row, attributes)
        elif row["name"] == FAILED_CALL_NAME:
            kind, data = REQUEST, _failed(row)
        elif row["kind"] == KIND_REWARD:
            kind, data = REWARD, {"value": row["reward"]}
        else:
            continue
        events.append(Event(kind, row["rollout_id"], attempt_id, row["start_ns"] / 1e9, data))
    return events


def last_reward(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """The value of the newest reward for the rollout itself among an attempt's spans; None where there is none."""
    rewards = [
        row["reward"] for row in rows if row["reward"] is not None and row["reward_target"] is None
    ]
    return rewards[-1] if rewards else None


class _Calls:
    """The calls of one attempt: each is stored as what it adds to an earlier one, the wire wants the whole."""

    def __init__(self) -> None:
        self._ids: dict[str, list[int]] = {}  # prompt and response by span id
        self._messages: dict[str, list[Any]] = {}

    def data_of(self, row: Mapping[str, Any], attributes: Mapping[str, Any]) -> dict[str, Any]:
        request, answer = attributes.get("request") or {}, attributes.get("response")
        parent = row["parent_call"]
        shared = self._ids.get(parent, [])[: row["parent_tokens"] or 0]
        prompt = [*shared, *row["prompt_ids"]]
        before = self._messages.get(parent, [])[: request.get("messages_from") or 0]
        messages = [*before, *(request.get("messages") or [])]
        self._ids[row["span_id"]] = [*prompt, *row["response_ids"]]
        self._messages[row["span_id"]] = [*messages, answer]
        return _request_data(row, request, messages, prompt, answer)


def _request_data(
    row: Mapping[str, Any],
    request: Mapping[str, Any],
    messages: list[Any],
    prompt: list[int],
    answer: Any,
) -> dict[str, Any]:
    versions = row["weight_versions"] or []
    version = versions[-1][1] if versions else None
    usage = {"prompt_tokens": row["prompt_tokens"], "completion_tokens": row["response_tokens"]}
    logprobs = [{"token": "", "logprob": one} for one in row["response_logprobs"] or []]
    choice = {
        "index": 0,
        "message": answer,
        "finish_reason": row["finish_reason"],
        "logprobs": {"content": logprobs},
        "token_ids": row["response_ids"],
    }
    response = {
        "id": f"chatcmpl-{row['span_id']}",
        "object": "chat.completion",
        "created": row["start_ns"] // 10**9,
        "model": row["model"],
        "choices": [choice],
        "prompt_token_ids": prompt,
        "usage": usage,
    }
    asked = {"model": row["model"], "messages": messages, **(request.get("sampling") or {})}
    if request.get("tools"):
        asked["tools"] = request["tools"]
    return {
        "model": row["model"],
        "model_version": version,
        "request": asked,
        "response": response,
        "server": {"model": row["model"], "endpoint": "", "version": version},
        "latency_ms": (row["end_ns"] - row["start_ns"]) / 1e6,
        "http_status": 200,
        "status": "ok",
        "retry_count": 0,
        "usage": usage,
        "finish_reason": row["finish_reason"],
    }


def _failed(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model": row["model"],
        "request": {},
        "response": {"error": {"message": row["status_message"]}},
        "latency_ms": (row["end_ns"] - row["start_ns"]) / 1e6,
        "http_status": 502,
        "status": "error",
        "retry_count": 0,
    }


def triplets(events: Iterable[Event]) -> list[Event]:
    """The events trimmed: of a model request ids and logprobs, of a reward its value. Of several requests with one and the same
    prompt only the last is kept, since the earlier ones were retried; those without prompt ids are all kept."""
    trimmed = [_trimmed(event) for event in events]
    prompts = [
        event.data["prompt_token_ids"] if event.event_type == REQUEST else [] for event in trimmed
    ]
    keys = [msgspec.json.encode(prompt) for prompt in prompts]
    last = {key: place for place, key in enumerate(keys)}
    return [
        event
        for place, event in enumerate(trimmed)
        if not prompts[place] or last[keys[place]] == place
    ]


def _trimmed(event: Event) -> Event:
    data = event.data
    if event.event_type == REWARD:
        short = {"value": data.get("value")}
        short |= {key: data[key] for key in ("source", "reason") if key in data}
        return msgspec.structs.replace(event, data=short)
    if event.event_type != REQUEST:
        return event
    response = _dict(data.get("response"))
    choices = response.get("choices")
    choice = _dict(choices[0]) if isinstance(choices, list) and choices else {}
    server = _dict(data.get("server"))
    prompt = response.get("prompt_token_ids") or choice.get("prompt_token_ids")
    short = {
        "prompt_token_ids": prompt if isinstance(prompt, list) else [],
        "response_token_ids": choice.get("token_ids") or [],
        "response_log_probs": _logprobs(choice.get("logprobs")),
        "server": {"model": server.get("model"), "version": server.get("version")},
    }
    short |= {key: data[key] for key in ("http_status", "status") if key in data}
    if "error" in response:
        short["error"] = response["error"]
    return msgspec.structs.replace(event, data=short)


def _logprobs(given: Any) -> list[float] | None:
    """Of a choice's `logprobs` (chat's form or completions'); None unless there is a finite number for every token."""
    content = _dict(given).get("content")
    values = (
        [_dict(one).get("logprob") for one in content]
        if isinstance(content, list)
        else _dict(given).get("token_logprobs")
    )
    if not isinstance(values, list):
        return None
    if not all(isinstance(one, int | float) and math.isfinite(one) for one in values):
        return None
    return [float(one) for one in values]


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
