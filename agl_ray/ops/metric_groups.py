"""Names of metrics as the writers show them: `group/name`, so that a dashboard has a few panels and no flat list of eighty.

    train/      the update: loss, gradient, clipping, advantages, entropy, and whatever else a loss reports
    rollout/    rewards, groups, calls, failures
    val/        held-out rows
    engine/     learner against engine on the same tokens
    staleness/  weight versions between a token and its training
    tokens/     made, trained, merged, dropped and why; rows
    time/       seconds by phase, tokens per second

Called by agl_ray/ops/writers.py. Test alone: tests/unit/test_ops_writers.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The first rule whose beginning fits; what fits none is the loss's own: train.
RULES = (
    ("time", ("seconds_", "sync_ms", "pause_ms", "tokens_per_second", "writer_")),
    ("engine", ("max_logprob_diff", "engine_kl", "tokens_current")),
    ("staleness", ("max_token_age", "token_age", "weight_version")),
    ("tokens", ("tokens_", "retokenized_", "rows")),
    (
        "rollout",
        ("reward", "failures", "groups", "valid_groups", "zero_signal", "dropped_groups", "rollouts",
         "unit", "calls", "branches"),
    ),
)  # fmt: skip
REST = "train"
# Written with its confidence interval and count from validation.jsonl.
ELSEWHERE = ("step", "validation")


def step_values(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row of metrics.jsonl (flat), by grouped name."""
    return {
        f"{_group(name)}/{_path(name)}": float(value)
        for name, value in row.items()
        if name not in ELSEWHERE and isinstance(value, int | float)
    }


def validation_values(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row of validation.jsonl, by grouped name."""
    return {
        f"val/{_path(name)}": float(value)
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float)
    }


def _group(name: str) -> str:
    return next((group for group, starts in RULES if name.startswith(starts)), REST)


def _path(name: str) -> str:
    """`failures.timeout` is `failures/timeout`; only the first dot divides, the rest is the user's own text."""
    return name.replace(".", "/", 1)
