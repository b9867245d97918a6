"""metrics.jsonl: one flat JSON object per training step, appended as it happens; validation.jsonl: one per validation.

Written by the controller, read by the curves, the summary, the writers (`agl_ray.ops.writers`) and anybody's notebook. A dictionary
among the values becomes `name.key` columns, so that every value is a number, a text or null. Test alone: tests/unit/test_ops_metrics.py.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

FILE_NAME = "metrics.jsonl"
VALIDATION_FILE = "validation.jsonl"

# Names that the screen and the curves know, with their meaning; rooms may add others.
STEP_METRICS = {
    "step": "training step, from 1; its update makes weight version `step`",
    "reward": "mean reward of the batch's rollouts",
    "reward_role": "mean reward of the units (`credit.unit`) with a call in that role (`reward_role.planner`, ...)",
    "reward_tag": "mean reward of the units with a call that has that tag (`reward_tag.search`, ...)",
    "validation": "mean reward on the held-out rows after this step, where there was a validation",
    "groups": "groups in the batch",
    "zero_signal_groups": "groups whose rewards are all equal: no gradient from them",
    "valid_groups": "groups with signal",
    "overlong_penalty": "mean of what was taken off a unit's reward for its length (algorithm.overlong_tokens); `reward` is before it",
    "overlong_share": "share of the units that lost some",
    "groups_sampled": "groups sampled for the step, those without signal included (algorithm.zero_signal refill; so the next three)",
    "groups_refilled": "of these, groups without signal that a further row was sampled for",
    "groups_short": "groups that the batch lacks since the step's further groups were used up",
    "reward_sampled": "mean reward of the rollouts of all groups sampled; `reward` is of those with signal",
    "dropped_groups": "groups dropped for too few ok attempts, since the start of the run",
    "rollouts": "rollouts in the batch",
    "tokens_of_batch": "tokens that the model produced in the batch's rollouts",
    "tokens_per_second": "those tokens over the seconds of rollout, update and sync together",
    "max_token_age": "largest age of a trained token, in weight versions (staleness)",
    "token_age": "trained tokens by age (`token_age.0`, `token_age.1`, ...)",
    "token_age_mean": "mean age of the trained tokens",
    "sync_ms": "milliseconds from the order to the last engine's checksum",
    "pause_ms": "milliseconds during which calls were held",
    "max_logprob_diff": "largest |learner - engine| log-probability of a trained token that the version at the start of the step made; with learner.lora.per_role also of each role (`max_logprob_diff.planner`, ...)",
    "lr": "learning rate of the step's updates (learner.schedule); of the last one where a warm-up raises it",
    "engine_kl": "mean k3 estimate, in nats, of the engine's divergence from the learner on those tokens; neither is there in a step that trained on tokens of older versions alone",
    "max_logprob_diff_all": "as max_logprob_diff, of the trained tokens of all ages",
    "engine_kl_all": "as engine_kl, of the trained tokens of all ages",
    "grad_norm": "norm of the policy's gradient before clipping, mean over the step's updates",
    "entropy": "mean -log pi of the trained tokens at the start of the step, in nats; not there in a step without an update (so the next four)",
    "clip_low_fraction": "share of the trained tokens whose ratio was cut at the lower bound, of losses that have one",
    "clip_high_fraction": "the same at the upper bound",
    "kl_reference": "mean k3 estimate, in nats, of the policy's divergence from its reference at the start of the step (algorithm.kl)",
    "kl_old": "mean k3 estimate of the divergence of the policy at the start of the step from the one after its updates, in nats; 0 with one update per step",
    "kl_teacher": "mean log pi - log teacher of the trained tokens at the start of the step, in nats (algorithm.teacher)",
    "rows_scored": "rows that the teacher scored",
    "rows_dropped_unscored": "rows that it did not score and that are therefore not trained",
    "seconds_teacher": "seconds of the teacher's scoring, inside the update's",
    "failures": "attempts that did not end ok, by end reason (`failures.timeout`, ...)",
    "seconds_rollout": "seconds spent waiting for the batch",
    "seconds_update": "seconds of the learner's update",
    "seconds_sync": "seconds of the weight update",
    "writer_failures": "failed attempts of a writer since the start of the sitting (`writer_failures.wandb`, ...)",
}

# Of validation.jsonl.
VALIDATION_METRICS = {
    "step": "training steps before it; 0 = the base model",
    "reward": "mean reward of the held-out rows whose attempts ended ok",
    "reward_low": "lower end of its 95 % confidence interval",
    "reward_high": "upper end",
    "rollouts": "how many these rows are",
    "failures": "the other rows by end reason",
}


class MetricsWriter:
    """Appends rows to `folder/metrics.jsonl` (or another name); each is on disk when `write` returns."""

    def __init__(self, folder: Path, name: str = FILE_NAME) -> None:
        self.path = Path(folder) / name

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row. It must have `step`; ValueError for a value that is neither number, text, null nor dictionary."""
        if "step" not in row:
            raise ValueError(f"a metrics row needs 'step', got {sorted(row)}")
        with self.path.open("ab") as file:
            file.write(msgspec.json.encode(flatten(row)) + b"\n")

    def cut(self, step: int) -> None:
        """Drop the rows after `step`, which a resumed run writes again, and a torn last line."""
        if not self.path.exists():
            return
        rows = read_metrics(self.path.parent, self.path.name)
        kept = [row for row in rows if row["step"] <= step]
        fresh = self.path.with_suffix(".new")
        fresh.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in kept))
        os.replace(fresh, self.path)


def flatten(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dictionaries inside become `name.key`; numpy numbers become Python's."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
            continue
        if hasattr(value, "item") and not isinstance(value, str):
            value = value.item()
        if not (value is None or isinstance(value, int | float | str)):
            raise ValueError(
                f"metric {prefix}{name}: expected a number, a text or null, got a {type(value).__name__}"
            )
        flat[prefix + name] = value
    return flat


def read_metrics(folder: Path, name: str = FILE_NAME, start: int = 0) -> list[dict[str, Any]]:
    """The rows of `folder/metrics.jsonl` (or another name) from number `start` on, oldest first; none where there is no file. A torn
    last line is left out."""
    path = Path(folder) / name
    if not path.exists():
        return []
    with path.open("rb") as file:
        lines = itertools.islice(file, start, None)
        return [msgspec.json.decode(line) for line in lines if line.endswith(b"\n")]


def tokens_per_second(row: Mapping[str, Any]) -> float | None:
    """Produced tokens per second of the step (rollout, update and sync together); None where the row does not say."""
    tokens = row.get("tokens_of_batch")
    seconds = sum(
        float(row.get(f"seconds_{name}") or 0.0) for name in ("rollout", "update", "sync")
    )
    return float(tokens) / seconds if tokens is not None and seconds > 0 else None


def valid_groups(row: Mapping[str, Any]) -> int | None:
    """Groups of the batch whose rewards differ."""
    groups = row.get("groups")
    return None if groups is None else int(groups) - int(row.get("zero_signal_groups") or 0)


def failures_of(row: Mapping[str, Any]) -> dict[str, int]:
    """Failures by reason, from a row with a dictionary or with flat `failures.reason` columns."""
    inner = row.get("failures")
    found = dict(inner) if isinstance(inner, Mapping) else {}
    found.update({k.split(".", 1)[1]: v for k, v in row.items() if k.startswith("failures.")})
    return {reason: int(count) for reason, count in found.items() if count}
