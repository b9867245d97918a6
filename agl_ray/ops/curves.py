"""curves.png: the run at a glance, drawn from metrics.jsonl.

Four panels over the training step: reward and validation; tokens per second; log-probability difference between engine and
learner; seconds by phase, stacked. Called by the trainer at the end (`draw_losses`: of a fine-tuning, by learner/sft_run.py); by hand: `python -m agl_ray.ops.curves RUN_FOLDER`.
matplotlib is imported here only, without a screen. Test alone: tests/unit/test_ops_curves.py.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agl_ray.ops.metrics import VALIDATION_FILE, read_metrics, tokens_per_second

FILE_NAME = "curves.png"
# Colour-blind safe (Okabe and Ito).
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = (
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#7f7f7f",
)  # fmt: skip
PHASES = [
    ("rollout", BLUE),
    ("update", ORANGE),
    ("sync", GREEN),
    ("validation", PURPLE),
    ("checkpoint", GREY),
]
Rows = Sequence[Mapping[str, Any]]


def draw_curves(folder: Path, validation: Mapping[str, Any] | None = None) -> Path | None:
    """Draw `folder/curves.png`; None when there are no metrics yet.

    validation: the summary's part of that name; adds the points before and after training with their 95 % intervals.
    """
    rows = read_metrics(folder)
    if not rows:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained", sharex=True)
    _reward(panels[0][0], rows, validation or {})
    _speed(panels[0][1], rows)
    _difference(panels[1][0], rows)
    _seconds(panels[1][1], rows)
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_axisbelow(True)
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.xaxis.get_major_locator().set_params(integer=True)
    for panel in panels[1]:
        panel.set_xlabel("training step")
    figure.suptitle(Path(folder).resolve().name, fontsize=11, color=GREY)
    path = Path(folder) / FILE_NAME
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def draw_losses(folder: Path) -> Path | None:
    """Draw `folder/curves.png` of a fine-tuning: the loss of each update and on held-out rows; None when there are no metrics yet."""
    rows = read_metrics(folder)
    if not rows:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    panel.plot(*_column(rows, "loss"), color=BLUE, linewidth=1.2, label="training batch")
    held_out = read_metrics(folder, VALIDATION_FILE)
    if held_out:
        panel.plot(
            *_column(held_out, "loss"), color=RED, marker="o", linestyle="--", label="held-out rows"
        )
    panel.set(xlabel="update", title="loss per token that the model has to say, nats")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.legend(frameon=False)
    path = Path(folder) / FILE_NAME
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _column(rows: Rows, name: str) -> tuple[list[int], list[float]]:
    """Steps and values where the rows have `name`."""
    held = [(row["step"], float(row[name])) for row in rows if row.get(name) is not None]
    return [step for step, _ in held], [value for _, value in held]


def _reward(panel: Any, rows: Rows, validation: Mapping[str, Any]) -> None:
    steps, values = _column(rows, "reward")
    panel.plot(steps, values, color=BLUE, linewidth=1.6, label="training batch")
    steps, sampled = _column(rows, "reward_sampled")
    if sampled:  # the batch has the groups with signal only
        panel.plot(steps, sampled, color=ORANGE, linewidth=1.6, label="all groups sampled")
    points = list(zip(*_column(rows, "validation"), strict=True))
    ends = [("before", 0), ("after", max(row["step"] for row in rows))]
    spreads = {}
    for name, step in ends:
        if validation.get(name) is not None:
            points.append((step, validation[name]))
            spreads[step] = validation[f"ci95_{name}"]
    if points:
        points = sorted(dict(points).items())
        at, means = [p[0] for p in points], [p[1] for p in points]
        low = [max(0.0, mean - spreads.get(step, (mean, mean))[0]) for step, mean in points]
        high = [max(0.0, spreads.get(step, (mean, mean))[1] - mean) for step, mean in points]
        panel.errorbar(
            at, means, yerr=[low, high], color=RED, marker="o", markersize=5, linewidth=1.2,
            linestyle="--", capsize=4, label="held-out rows (95 % CI)",
        )  # fmt: skip
        for step, mean in (points[0], points[-1]):
            panel.annotate(
                f"{mean:.3f}", (step, mean), xytext=(6, -16), textcoords="offset points", color=RED
            )
    _unit_range(panel, values + sampled + [p[1] for p in points])
    panel.set_title("mean reward")
    panel.legend(frameon=False, loc="lower right")


def _unit_range(panel: Any, values: list[float]) -> None:
    """Rewards in [0, 1] get that axis, so that runs compare at a glance."""
    if values and min(values) >= 0 and max(values) <= 1:
        panel.set_ylim(-0.02, 1.02)


def _speed(panel: Any, rows: Rows) -> None:
    held = [(row["step"], speed) for row in rows if (speed := tokens_per_second(row)) is not None]
    panel.plot([s for s, _ in held], [v for _, v in held], color=BLUE, linewidth=1.6)
    panel.set_ylim(0, 1.1 * max([v for _, v in held], default=1.0))
    panel.set_title("tokens produced per second of the step")


def _difference(panel: Any, rows: Rows) -> None:
    steps, values = _column(rows, "max_logprob_diff")
    # Exact agreement cannot be drawn on a logarithmic axis.
    panel.plot(steps, [max(value, 1e-9) for value in values], color=BLUE, linewidth=1.6)
    panel.axhline(1e-3, color=RED, linewidth=1, linestyle=":")
    panel.set_yscale("log")
    panel.annotate(
        "a healthy float32 run stays below", (steps[-1] if steps else 1, 1e-3), xytext=(0, -4),
        textcoords="offset points", color=RED, fontsize=9, ha="right", va="top",
    )  # fmt: skip
    panel.set_title("largest log-probability difference, engine and learner")


def _seconds(panel: Any, rows: Rows) -> None:
    steps = [row["step"] for row in rows]
    used = [
        (name, colour)
        for name, colour in PHASES
        if any(float(row.get(f"seconds_{name}") or 0) > 0 for row in rows)
    ]
    bottom = [0.0] * len(rows)
    for name, colour in used:
        heights = [float(row.get(f"seconds_{name}") or 0) for row in rows]
        panel.bar(steps, heights, bottom=bottom, width=0.85, color=colour, label=name)
        bottom = [base + height for base, height in zip(bottom, heights, strict=True)]
    panel.set_title("seconds by phase")
    if used:
        # Room above the bars for the legend.
        panel.set_ylim(0, 1.25 * max(bottom))
        panel.legend(frameon=False, loc="upper left", ncols=len(used), handlelength=1, fontsize=9)


if __name__ == "__main__":
    print(draw_curves(Path(sys.argv[1])) or f"no metrics in {sys.argv[1]}")
