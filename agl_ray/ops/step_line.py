"""The line of a step: on a terminal (aligned under a header) and, with a few columns more, in a log (with names).

Called by both displays. Test alone: tests/unit/test_ops_display.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from agl_ray.ops.events import StepDone
from agl_ray.ops.metrics import failures_of, tokens_per_second, valid_groups
from agl_ray.ops.numbers import short

Row = Mapping[str, Any]


def _number(name: str, form: Callable[[float], str]) -> Callable[[Row], str]:
    def column(row: Row) -> str:
        value = row.get(name)
        return "-" if value is None else form(float(value))

    return column


def _groups(row: Row) -> str:
    """Groups with a gradient / groups in the batch, and `+N`: groups without one that were replaced on the way."""
    valid = valid_groups(row)
    if valid is None:
        return "-"
    refilled = int(row.get("groups_refilled") or 0)
    wanted = int(row["groups"]) + int(row.get("groups_short") or 0)
    return f"{valid}/{wanted}" + (f"+{refilled}" if refilled else "")


def _speed(row: Row) -> str:
    speed = tokens_per_second(row)
    return "-" if speed is None else short(speed)


def _failures(row: Row) -> str:
    """`none`, or counts by end reason."""
    counts = failures_of(row)
    words = [f"{reason} {count}" for reason, count in sorted(counts.items())]
    return ", ".join(words) or "none"


# title, width, what it shows
COLUMNS: list[tuple[str, int, Callable[[Row], str]]] = [
    ("reward", 6, _number("reward", lambda x: f"{x:.3f}")),
    ("val", 6, _number("validation", lambda x: f"{x:.3f}")),
    ("groups", 7, _groups),
    ("tok/s", 6, _speed),
    ("stale", 5, _number("max_token_age", lambda x: f"{x:g}")),
    ("sync ms", 7, _number("sync_ms", lambda x: f"{x:.0f}")),
    ("dlogp", 7, _number("max_logprob_diff", lambda x: f"{x:.0e}")),
    ("kl ref", 7, _number("kl_reference", lambda x: f"{x:.0e}")),
    ("kl teach", 8, _number("kl_teacher", lambda x: f"{x:.3f}")),
    ("rollout s", 9, _number("seconds_rollout", lambda x: f"{x:.1f}")),
    ("update s", 8, _number("seconds_update", lambda x: f"{x:.1f}")),
    ("failures", 0, _failures),
]
STEP_WIDTH = 7
NARROW = 100  # characters; a narrower screen does without these columns
LEFT_OUT = ("stale", "dlogp")
LOG_ONLY = ("kl ref", "kl teach")  # of runs with such a model; the others have no room for it


def _columns(width: int) -> list[tuple[str, int, Callable[[Row], str]]]:
    without = LOG_ONLY if width >= NARROW else (*LOG_ONLY, *LEFT_OUT)
    return [column for column in COLUMNS if column[0] not in without]


def header(width: int = NARROW) -> str:
    """The titles over `aligned` lines on a screen of `width` characters."""
    titles = [f"{title:>{wide}}" if wide else title for title, wide, _ in _columns(width)]
    return f"{'step':>{STEP_WIDTH}}  " + "  ".join(titles)


def aligned(event: StepDone, width: int = NARROW) -> str:
    """One step under the header."""
    cells = []
    for _, wide, column in _columns(width):
        text = column(event.metrics)
        cells.append(f"{text:>{wide}}" if wide else text)
    return f"{f'{event.step}/{event.steps}':>{STEP_WIDTH}}  " + "  ".join(cells)


def named(event: StepDone) -> str:
    """One step for a log: `step 3/40: reward 0.512, groups 16/16, ...`; columns without a value are left out."""
    cells = [(title, column(event.metrics)) for title, _, column in COLUMNS]
    return f"step {event.step}/{event.steps}: " + ", ".join(
        f"{title} {text}" for title, text in cells if text != "-"
    )


def validation_line(step: int, accuracy: float, ci95: tuple[float, float], n: int) -> str:
    """`validation before training: 0.215 (95 % CI 0.169 to 0.269, n = 256)`."""
    when = "before training" if step == 0 else f"after step {step}"
    low, high = ci95
    return f"validation {when}: {accuracy:.3f} (95 % CI {low:.3f} to {high:.3f}, n = {n})"
