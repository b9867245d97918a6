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


def _clipped(row: Row) -> str:
    """Shares of the trained tokens cut at the lower and at the upper bound, `0.010/0.020`."""
    sides = [
        _number(f"clip_{side}_fraction", lambda x: f"{x:.3f}")(row) for side in ("low", "high")
    ]
    return "-" if sides == ["-", "-"] else "/".join(sides)


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
    ("eng kl", 6, _number("engine_kl", lambda x: f"{x:.0e}")),
    ("grad", 7, _number("grad_norm", lambda x: f"{x:.2g}")),
    ("entropy", 7, _number("entropy", lambda x: f"{x:.3f}")),
    ("kl old", 6, _number("kl_old", lambda x: f"{x:.0e}")),
    ("clip", 11, _clipped),
    ("kl ref", 7, _number("kl_reference", lambda x: f"{x:.0e}")),
    ("kl teach", 8, _number("kl_teacher", lambda x: f"{x:.3f}")),
    ("rollout s", 9, _number("seconds_rollout", lambda x: f"{x:.1f}")),
    ("update s", 8, _number("seconds_update", lambda x: f"{x:.1f}")),
    ("failures", 0, _failures),
]
STEP_WIDTH = 7
NARROW = 100  # characters; a narrower screen does without these columns
LEFT_OUT = ("stale", "dlogp")
WIDE = 120  # a screen from here on has these too
WIDE_ONLY = ("eng kl", "grad")
LOG_ONLY = ("entropy", "kl old", "clip", "kl ref", "kl teach")  # a screen has no room for them


def _columns(width: int) -> list[tuple[str, int, Callable[[Row], str]]]:
    wide, narrow = width >= WIDE, width < NARROW
    without = (*LOG_ONLY, *(() if wide else WIDE_ONLY), *(LEFT_OUT if narrow else ()))
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
