"""summary.json: what a run came to, in one flat-enough JSON object.

Written by the trainer at the end of a run, also of one that failed or was interrupted after its start; shown by
`agl_ray.ops.summary_text`. Keys that are always there:

    validation            {before, after, ci95_before, ci95_after, n}: mean reward on the held-out rows
    attempts              attempts by end reason, all reasons named, training and validation
    retokenized_tokens    tokens of conversations that had to be rendered afresh (contract 4: 0 is the aim)
    updates               optimiser steps' batches trained; weight_versions = updates + 1
    max_logprob_diff      largest |learner - engine| log-probability seen, same weights and tokens; null: no token was compared
    seconds               {setup, sft, rollout, update, sync, idle, total}; idle = total - the others
    seed, name, run_folder
    events                sentences: deaths and recoveries, in order
    examples              conversations before and after, of the same held-out rows

Test alone: tests/unit/test_ops_summary.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from agl_ray.ops.numbers import confidence_interval
from agl_ray.types import EndReason

__all__ = ["FILE_NAME", "confidence_interval", "make_summary", "read_summary", "write_summary"]

FILE_NAME = "summary.json"
PHASES = ("setup", "sft", "rollout", "update", "sync")


def make_summary(
    *,
    before: Sequence[float] | None,
    after: Sequence[float] | None,
    attempts: Mapping[str, int],
    seconds: Mapping[str, float],
    total_seconds: float,
    updates: int,
    weight_versions: int,
    max_logprob_diff: float | None,
    retokenized_tokens: int,
    seed: int,
    events: Sequence[str] = (),
    examples: Sequence[Mapping[str, Any]] = (),
    **more: Any,
) -> dict[str, Any]:
    """The summary as plain data.

    before, after: rewards of the two validations' `ok` attempts (None: did not take place). attempts: counts by end
    reason. seconds: by phase; phases besides the five named ones keep their name. examples:
    `{"input": ..., "before": {"messages": [...], "reward": r}, "after": ...}`. more: further keys, such as run_folder.
    """
    spent = {name: float(seconds.get(name, 0.0)) for name in PHASES}
    others = {name: float(value) for name, value in seconds.items() if name not in PHASES}
    others.pop("idle", None)
    others.pop("total", None)
    idle = max(0.0, total_seconds - sum(spent.values()) - sum(others.values()))
    counts = {str(reason): int(attempts.get(reason, 0)) for reason in EndReason}
    return {
        "validation": _validation(before, after),
        "retokenized_tokens": int(retokenized_tokens),
        "attempts": counts,
        "updates": int(updates),
        "weight_versions": int(weight_versions),
        "max_logprob_diff": None if max_logprob_diff is None else float(max_logprob_diff),
        "seconds": {**spent, **others, "idle": idle, "total": float(total_seconds)},
        "seed": int(seed),
        "events": list(events),
        "examples": [dict(example) for example in examples],
        **more,
    }


def _validation(before: Sequence[float] | None, after: Sequence[float] | None) -> dict[str, Any]:
    sides: dict[str, Any] = {}
    for name, rewards in (("before", before), ("after", after)):
        mean, interval = confidence_interval(rewards) if rewards else (None, None)
        sides[name] = mean
        sides[f"ci95_{name}"] = list(interval) if interval else None
    sides["n"] = len(after or before or ())
    return sides


def write_summary(folder: Path, **facts: Any) -> dict[str, Any]:
    """`make_summary(**facts)`, written to `folder/summary.json` in one go; returned."""
    summary = make_summary(**facts)
    path = Path(folder) / FILE_NAME
    fresh = path.with_suffix(".new")
    fresh.write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n")
    os.replace(fresh, path)
    return summary


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary in a run folder; FileNotFoundError where the run has not ended."""
    summary: dict[str, Any] = msgspec.json.decode((Path(folder) / FILE_NAME).read_bytes())
    return summary
