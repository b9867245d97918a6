"""`operation`: who is whose child, what is recorded of a call, sync and async, and what happens to one that does not end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

import agl_ray as agl
from agl_ray.spans import span_batch
from agl_ray.tracing import SpanRecorder, recording


@pytest.fixture
def recorder() -> Any:
    one = SpanRecorder("ro-1", "at-1")
    with recording(one):
        yield one


def by_name(recorder: SpanRecorder) -> dict[str, dict[str, Any]]:
    rows = recorder.take()
    span_batch(rows)
    return {
        row["attributes"].get("agentlightning.operation.name", row["name"]): row for row in rows
    }


def test_nested_operations_and_emitters_have_their_parents(recorder: SpanRecorder) -> None:
    with agl.operation(name="outer", phase="plan", tags=["search"]) as outer:
        agl.emit_message("hi")
        with agl.operation(name="inner"):
            agl.emit_reward(1.0)
        outer.set_input(1, [2, {"a": 3}], query="x")
        outer.set_output({"found": [1, 2]})
    rows = by_name(recorder)
    top = rows["outer"]
    assert (top["parent_id"], top["status"]) == (None, "OK")
    assert rows["agentlightning.message"]["parent_id"] == top["span_id"]
    assert rows["inner"]["parent_id"] == top["span_id"]
    assert rows["agentlightning.annotation"]["parent_id"] == rows["inner"]["span_id"]
    assert {row["trace_id"] for row in rows.values()} == {top["trace_id"]}
    assert top["attributes"] == {
        "agentlightning.operation.name": "outer",
        "phase": "plan",
        "agentlightning.tag.0": "search",
        "agentlightning.operation.input.args.0": 1,
        "agentlightning.operation.input.args.1.0": 2,
        "agentlightning.operation.input.args.1.1.a": 3,
        "agentlightning.operation.input.query": "x",
        "agentlightning.operation.output.found": [1, 2],
    }
    assert top["start_ns"] <= rows["inner"]["start_ns"] <= rows["inner"]["end_ns"] <= top["end_ns"]
    assert outer.span().span_id == top["span_id"]


def test_functions_record_arguments_and_result(recorder: SpanRecorder) -> None:
    class Tool:
        @agl.operation(kind="tool")
        def look(self, query: str, *rest: int, limit: int = 3) -> list[str]:
            return [query] * limit

    assert Tool().look("a", 7) == ["a"] * 3
    row = by_name(recorder)["look"]
    assert row["attributes"] == {
        "agentlightning.operation.name": "look",
        "kind": "tool",
        "agentlightning.operation.input.query": "a",
        "agentlightning.operation.input.rest": [7],
        "agentlightning.operation.input.limit": 3,
        "agentlightning.operation.output": ["a", "a", "a"],
    }


def test_coroutines_at_once_do_not_become_each_others_children(recorder: SpanRecorder) -> None:
    @agl.operation
    async def step(number: int, children: int = 0) -> int:
        await asyncio.sleep(0)
        await asyncio.gather(*(step(10 * number + n) for n in range(children)))
        return number

    async def main() -> None:
        await asyncio.gather(step(1, 3), step(2, 3))

    asyncio.run(main())
    rows = {
        row["attributes"]["agentlightning.operation.input.number"]: row for row in recorder.take()
    }
    assert len(rows) == 8
    for number, row in rows.items():
        above = None if number < 10 else rows[number // 10]["span_id"]
        assert row["parent_id"] == above


def test_an_exception_marks_the_span_and_goes_on(recorder: SpanRecorder) -> None:
    @agl.operation
    def fails() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fails()
    row = by_name(recorder)["fails"]
    assert (row["status"], row["status_message"]) == ("ERROR", "ValueError: no")
    assert row["events"][0]["attributes"]["exception.type"] == "ValueError"
    with pytest.raises(TypeError):
        fails(1)  # type: ignore[call-arg]
    assert by_name(recorder)["fails"]["status"] == "ERROR"


def test_outside_of_a_rollout_the_work_is_done_all_the_same() -> None:
    @agl.operation
    def double(number: int) -> int:
        return 2 * number

    assert double(2) == 4
    with agl.operation(propagate=False, name="alone") as op:
        op.set_output(1)
    assert op.span().attributes["agentlightning.operation.output"] == 1


def test_what_is_still_open_at_the_end_is_recorded_as_unfinished() -> None:
    recorder = SpanRecorder("ro-1", "at-1")
    with recording(recorder), agl.operation(name="left open") as op:
        op.set_input(x=1)
        (row,) = recorder.close()
        assert row["attributes"]["agl.unfinished"] is True
        assert row["attributes"]["agentlightning.operation.input.x"] == 1
        assert row["end_ns"] >= row["start_ns"]
    assert recorder.take() == []
    assert recorder.num_spans == 1


def test_misuse_is_told(recorder: SpanRecorder) -> None:
    def numbers() -> Iterator[int]:
        yield 1

    with pytest.raises(agl.InputError, match="got a generator"):
        agl.operation(numbers)
    with pytest.raises(agl.InputError, match="expected a function"):
        agl.operation("search")  # type: ignore[call-overload]
    op = agl.operation()
    with pytest.raises(RuntimeError, match="inside of its `with` block"):
        op.set_output(1)
    with pytest.raises(RuntimeError, match="block to be over"):
        op.span()
    with op, pytest.raises(RuntimeError, match="entered already"):
        op.__enter__()
