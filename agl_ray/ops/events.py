"""What a run tells while it runs: phases, progress, steps, validations, notices, the end.

Made by the trainer (set-up) and by the controller (the loops), in order; shown by `agl_ray.ops.display`. msgspec structs:
picklable, and JSON objects with the key `kind` both ways (`event_to_dict`, `event_from_dict`). Test alone:
tests/unit/test_ops_display.py.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec


class Phase(msgspec.Struct, frozen=True, tag_field="kind", tag="phase"):
    """A named piece of work starts or ends (`seconds` at its end). Phases of a step: rollout, update, sync, ..."""

    name: str
    state: Literal["start", "end"]
    seconds: float | None = None


class Progress(msgspec.Struct, frozen=True, tag_field="kind", tag="progress"):
    """`done` of `total` units of `name`; the bar ends when they are equal. `detail`: a few words, such as a loss."""

    name: str
    done: float
    total: float
    detail: str = ""


class StepDone(msgspec.Struct, frozen=True, tag_field="kind", tag="step"):
    """A training step is done. `metrics`: the row of metrics.jsonl (names: `agl_ray.ops.metrics.STEP_METRICS`)."""

    step: int
    steps: int
    metrics: dict[str, Any]


class Validation(msgspec.Struct, frozen=True, tag_field="kind", tag="validation"):
    """Mean reward on `n` held-out rows with the weights after `step` steps, and its 95 % confidence interval."""

    step: int
    accuracy: float
    ci95: tuple[float, float]
    n: int


class Notice(msgspec.Struct, frozen=True, tag_field="kind", tag="notice"):
    """Something a person should know, in a sentence. `restarted`: the kind of process that died and was replaced, where it is that."""

    text: str
    restarted: str | None = None


class Failed(msgspec.Struct, frozen=True, tag_field="kind", tag="error"):
    """The run ends with an error: its paragraph."""

    text: str


class Done(msgspec.Struct, frozen=True, tag_field="kind", tag="done"):
    """The run is over; `summary` as in summary.json (or the facts it will be made of)."""

    summary: dict[str, Any]


Event: TypeAlias = Phase | Progress | StepDone | Validation | Notice | Failed | Done


def event_to_dict(event: Event) -> dict[str, Any]:
    """The event as plain data, with its `kind`."""
    plain: dict[str, Any] = msgspec.to_builtins(event)
    return plain


def event_from_dict(plain: dict[str, Any]) -> Event:
    """The event that plain data means; msgspec.ValidationError names what does not fit."""
    return msgspec.convert(plain, Event)
