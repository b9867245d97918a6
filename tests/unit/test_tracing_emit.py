"""Emitters: what they record, under which names, for what, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import threading
from typing import Any

import numpy as np
import pydantic
import pytest

import agl_ray as agl
from agl_ray.spans import span_batch
from agl_ray.tracing import SpanRecorder, make_link_attributes, make_tag_attributes, recording
from agl_ray.tracing.recorder import MANY, MOST


@pytest.fixture
def recorder() -> Any:
    one = SpanRecorder("ro-1", "at-1")
    with recording(one):
        yield one


def only(recorder: SpanRecorder) -> dict[str, Any]:
    (row,) = recorder.take()
    span_batch([row])  # it fits the schema
    return row


def test_a_scalar_reward_is_the_rollouts(recorder: SpanRecorder) -> None:
    span = agl.emit_reward(np.float32(0.5), attributes={"why": {"rule": "exact"}})
    row = only(recorder)
    assert (row["kind"], row["name"]) == ("reward", "agentlightning.annotation")
    assert (row["reward"], row["reward_dimension"], row["reward_target"]) == (0.5, "primary", None)
    assert row["attributes"] == {
        "agentlightning.reward.0.name": "primary",
        "agentlightning.reward.0.value": 0.5,
        "why.rule": "exact",
    }
    assert (span.span_id, span.extra["reward"]) == (row["span_id"], 0.5)
    assert recorder.last_reward() == 0.5


def test_the_primary_dimension_is_number_0(recorder: SpanRecorder) -> None:
    agl.emit_reward({"short": 0.25, "right": 1}, primary_key="right")
    row = only(recorder)
    assert (row["reward"], row["reward_dimension"]) == (1.0, "right")
    assert row["attributes"]["agentlightning.reward.1.name"] == "short"
    assert row["attributes"]["agentlightning.reward.1.value"] == 0.25


@pytest.mark.parametrize(
    ("options", "target"),
    [
        ({"call_id": "chatcmpl-00c0ffee00c0ffee"}, "00c0ffee00c0ffee"),
        ({"call_id": "resp_00c0ffee00c0ffee"}, "00c0ffee00c0ffee"),
        ({"call_id": "msg_00c0ffee00c0ffee"}, "00c0ffee00c0ffee"),
        ({"call_id": "00c0ffee00c0ffee"}, "00c0ffee00c0ffee"),
        ({"tag": "search"}, "tag:search"),
        ({"role": "planner"}, "role:planner"),
        ({"turn": 2}, "turn:2"),
        ({"attributes": make_link_attributes({"gen_ai.response.id": "chatcmpl-1"})}, "1"),
        ({"attributes": make_link_attributes({"agentlightning.tag.0": "plan"})}, "tag:plan"),
        ({"attributes": make_tag_attributes(["fast"])}, None),  # a tag of the reward itself
    ],
)
def test_a_reward_names_what_it_is_for(
    recorder: SpanRecorder, options: dict[str, Any], target: str | None
) -> None:
    agl.emit_reward(0.75, **options)
    row = only(recorder)
    assert row["reward_target"] == target
    assert recorder.last_reward() == (0.75 if target is None else None)


@pytest.mark.parametrize("value", [math.nan, math.inf, "1", None, [1.0], {"a": 1.0}])
def test_what_is_no_reward_is_refused(recorder: SpanRecorder, value: Any) -> None:
    with pytest.raises(ValueError, match=r"finite number|primary_key"):
        agl.emit_reward(value)
    with pytest.raises(ValueError, match=r"finite number|primary_key"):
        agl.emit_reward({"a": value}, primary_key="a")
    assert recorder.take() == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"call_id": "a", "tag": "b"}, "got several"),
        ({"tag": ""}, "expected its target as text"),
        ({"turn": 0}, "expected its target as a number from 1"),
        ({"turn": True}, "expected its target as a number from 1"),
        ({"primary_key": "a"}, "goes with a dictionary"),
        ({"tag": "a", "attributes": make_link_attributes({"span_id": "b"})}, "got several"),
    ],
)
def test_contradictions_are_refused(
    recorder: SpanRecorder, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(agl.InputError, match=text):
        agl.emit_reward(1.0, **options)


def test_messages_and_annotations(recorder: SpanRecorder) -> None:
    agl.emit_message("too \ud800 odd", attributes={"step": 3})
    assert only(recorder)["attributes"] == {
        "agentlightning.message.body": "too \\ud800 odd",
        "step": 3,
    }
    agl.emit_annotation({"a": {"b": [1, 2]}, "c": [{"d": None}], "x": math.nan})
    assert only(recorder)["attributes"] == {
        "a.b": [1, 2],
        "c.0.d": None,
        "x": {"doubleValue": "NaN"},
    }
    with pytest.raises(agl.InputError, match="expected text, got dict"):
        agl.emit_message({"a": 1})  # type: ignore[arg-type]


class Model(pydantic.BaseModel):
    n: int


@dataclasses.dataclass
class Data:
    model: Model
    array: Any


@pytest.mark.parametrize(
    ("thing", "kind", "content"),
    [
        ("text", "str", {"literal": "text"}),
        (True, "bool", {"literal": "True"}),
        (b"ab", "bytes", {"literal": "YWI="}),
        ({"a": [1, None]}, "dict", {"json": '{"a":[1,null]}'}),
        (None, "NoneType", {"json": "null"}),
        (Data(Model(n=1), np.arange(2)), None, {"json": '{"model":{"n":1},"array":[0,1]}'}),
    ],
)
def test_objects(recorder: SpanRecorder, thing: Any, kind: str | None, content: Any) -> None:
    agl.emit_object(thing)
    attributes = only(recorder)["attributes"]
    assert attributes.pop("agentlightning.object.type") == (kind or f"{__name__}.Data")
    assert attributes == {f"agentlightning.object.{key}": item for key, item in content.items()}


def test_an_object_without_a_json_form_is_refused(recorder: SpanRecorder) -> None:
    endless: list[Any] = []
    endless.append(endless)
    for thing in (object(), {"lock": threading.Lock()}, endless):
        with pytest.raises(agl.InputError, match="can be written as JSON"):
            agl.emit_object(thing)
    agl.emit_annotation({"thing": endless, "lock": object()})  # here its text will do
    json.dumps(only(recorder)["attributes"])


def test_an_exception_is_recorded_with_its_traceback(recorder: SpanRecorder) -> None:
    try:
        raise KeyError("city")
    except KeyError as error:
        agl.emit_exception(error)
    row = only(recorder)
    assert row["status"] == "ERROR"
    assert row["attributes"]["exception.type"] == "KeyError"
    assert "test_tracing_emit.py" in row["attributes"]["exception.stacktrace"]
    assert row["events"][0]["name"] == "exception"


def test_outside_of_a_rollout() -> None:
    with pytest.raises(RuntimeError, match="no rollout is running here"):
        agl.emit_reward(1.0)
    assert agl.emit_reward(1.0, propagate=False).extra["reward"] == 1.0


def test_after_the_end_nothing_is_taken() -> None:
    recorder = SpanRecorder("ro-1", "at-1")
    with recording(recorder):
        agl.emit_message("before")
        assert len(recorder.close()) == 1
        with pytest.raises(RuntimeError, match="attempt at-1 has ended"):
            agl.emit_message("after")
    assert (recorder.late, recorder.num_spans, recorder.take()) == (1, 1, [])


def test_a_forked_copy_says_that_nobody_listens(
    recorder: SpanRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(RuntimeError, match="forked copy"):
        agl.emit_message("hello")


def test_spans_without_end_are_lost_and_counted(recorder: SpanRecorder) -> None:
    asked: list[int] = []
    recorder.on_many = lambda: asked.append(1)
    for _ in range(MOST + 3):
        recorder.add(name="n", kind="span")
    assert recorder.lost.total() == 3
    assert recorder.num_spans == MOST + 3
    assert len(recorder.take()) == MOST
    assert len(asked) == MOST + 3 - (MANY - 1)
