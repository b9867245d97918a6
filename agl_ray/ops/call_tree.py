"""The call tree of an attempt, for people: spans by their parents, with tokens, rewards and timing.

Called by `agl-ray dev` and `Trainer.dev`. A model call that names no parent is put under the shortest span that was open all the while: HTTP
clients tell nobody where they were called. Test alone: tests/unit/test_ops_call_tree.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.tree import Tree

from agl_ray.spans import KIND_CALL, KIND_REWARD

Row = dict[str, Any]
OPERATION = "agentlightning.operation.name"  # attribute: what the user called it


def call_tree(title: str, rows: Sequence[Row]) -> Tree:
    """A tree under `title` of rows in the columns of SPAN_SCHEMA."""
    known = {row["span_id"] for row in rows}
    children: dict[str | None, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["start_ns"], row["end_ns"])):
        parent = row.get("parent_id")
        if parent not in known:
            parent = _around(row, rows) if row["kind"] == KIND_CALL else None
        children.setdefault(parent, []).append(row)
    tree = Tree(title)
    start = min((row["start_ns"] for row in rows), default=0)

    def grow(branch: Tree, span_id: str | None) -> None:
        for row in children.get(span_id, []):
            grow(branch.add(_line(row, start)), row["span_id"])

    grow(tree, None)
    return tree


def totals(rows: Sequence[Row]) -> tuple[int, int, int]:
    """(model calls, prompt tokens, response tokens) of the rows."""
    calls = [row for row in rows if row["kind"] == KIND_CALL]
    prompt = sum(row.get("prompt_tokens") or 0 for row in calls)
    return len(calls), prompt, sum(row.get("response_tokens") or 0 for row in calls)


def _around(row: Row, rows: Sequence[Row]) -> str | None:
    spans = [
        other
        for other in rows
        if other["kind"] not in (KIND_CALL, KIND_REWARD)
        and other["start_ns"] <= row["start_ns"]
        and row["end_ns"] <= other["end_ns"]
    ]
    shortest = min(spans, key=lambda one: one["end_ns"] - one["start_ns"], default=None)
    return None if shortest is None else str(shortest["span_id"])


def _line(row: Row, start: int) -> str:
    seconds = (row["end_ns"] - row["start_ns"]) / 1e9
    words = [f"[dim]+{(row['start_ns'] - start) / 1e9:.2f} s[/]"]
    if row["kind"] == KIND_REWARD:
        dimension = row.get("reward_dimension") or "primary"
        words.append(f"[green]reward {row['reward']:g}[/]")
        words += [] if dimension == "primary" else [escape(dimension)]
        return "  ".join(words)
    name = escape(str((row.get("attributes") or {}).get(OPERATION) or row["name"]))
    role = row.get("role")
    words.append(f"[bold cyan]{name}[/]" if row["kind"] == KIND_CALL else f"[bold]{name}[/]")
    words += [f"role {escape(role)}"] if role else []
    words.append(f"{seconds:.2f} s")
    if row.get("prompt_tokens") is not None or row.get("response_tokens") is not None:
        words.append(f"{row.get('prompt_tokens') or 0} + {row.get('response_tokens') or 0} tokens")
    words += [escape(row["finish_reason"])] if row.get("finish_reason") else []
    if row["status"] == "ERROR":
        words.append(f"[red]{escape(row.get('status_message') or 'error')}[/]")
    return "  ".join(words)
