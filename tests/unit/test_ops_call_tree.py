"""A call tree for people: parents, calls without one, tokens and rewards."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from agl_ray.ops.call_tree import call_tree, totals


def row(name: str, start: float, end: float, **more: Any) -> dict[str, Any]:
    times = {"start_ns": int(start * 1e9), "end_ns": int(end * 1e9)}
    return {"span_id": name, "name": name, "kind": "span", "status": "OK", **times, **more}


def test_calls_hang_under_the_shortest_span_around_them() -> None:
    rows = [
        row("call-2", 5, 6, kind="call", prompt_tokens=10, response_tokens=2, role="judge"),
        row("outer", 0, 9),
        row("inner", 1, 4, parent_id="outer"),
        row("call-1", 2, 3, kind="call", status="ERROR", status_message="HTTP 503 [x]"),
        row("reward", 9, 9, kind="reward", reward=0.5, reward_dimension="style"),
        row("lost", 7, 8, parent_id="gone"),
    ]
    text = io.StringIO()
    Console(file=text, width=100).print(call_tree("row 1", rows))
    assert [line.rstrip() for line in text.getvalue().splitlines()] == [
        "row 1",
        "├── +0.00 s  outer  9.00 s",
        "│   ├── +1.00 s  inner  3.00 s",
        "│   │   └── +2.00 s  call-1  1.00 s  HTTP 503 [x]",
        "│   └── +5.00 s  call-2  role judge  1.00 s  10 + 2 tokens",
        "├── +7.00 s  lost  1.00 s",
        "└── +9.00 s  reward 0.5  style",
    ]
    assert totals(rows) == (2, 10, 2)
    assert totals([]) == (0, 0, 0)
