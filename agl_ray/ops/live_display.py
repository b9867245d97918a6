"""The live screen of a run: a line per step scrolls by, bars for what is going on stay below it.

Made by `agl_ray.ops.display.make_display` on a terminal. Test alone: tests/unit/test_ops_display.py.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from agl_ray.ops.display import PHASE_TITLES
from agl_ray.ops.events import Done, Event, Failed, Notice, Phase, Progress, StepDone, Validation
from agl_ray.ops.numbers import duration
from agl_ray.ops.step_line import aligned, header, validation_line
from agl_ray.ops.summary_text import render_summary

HEADER_EVERY = 20  # step lines between two headers
TITLE_WIDTH = 30

# During the steps three bars stay in their places, so that the screen does not jump: the steps, and what runners and learner do.
SLOTS = {
    "rollout": "runners",
    "validation": "runners",
    "update": "learner",
    "sync": "learner",
    "checkpoint": "learner",
}


class LiveDisplay:
    """Rich's live screen. Bars live below the lines; the closing text replaces them."""

    def __init__(self, stream: TextIO | None = None, config_file: str | None = None) -> None:
        self._config_file = config_file
        self._console = Console(file=stream, highlight=False)
        self._bars = Bars(
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.description}", justify="left"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[state]}"),
            console=self._console,
        )
        self._live = Live(self._bars, console=self._console, refresh_per_second=8, transient=True)
        self._tasks: dict[str, TaskID] = {}
        self._lines = 0
        self._first_step: tuple[int, float] | None = None

    def __enter__(self) -> LiveDisplay:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def show(self, event: Event) -> None:
        match event:
            case Phase():
                self._phase(event)
            case Progress():
                self._progress(event)
            case StepDone():
                self._step(event)
            case Validation():
                line = validation_line(event.step, event.accuracy, event.ci95, event.n)
                self._print(line, "bold cyan")
                self._lines = 0
            case Notice():
                self._print(f"notice: {event.text}", "yellow")
            case Failed():
                self._print(f"error: {event.text}", "bold red")
            case Done():
                self._done(event)

    def _phase(self, event: Phase) -> None:
        slot = SLOTS.get(event.name)
        if slot is not None:
            busy = event.state == "start"
            self._bar(slot, f"{slot}: {event.name if busy else 'idle'}", busy)
            return
        title = PHASE_TITLES.get(event.name, event.name)
        # Bars of the phase before, and what this one leaves behind, go: a new set of bars begins.
        self._clear()
        if event.state == "start":
            self._bar(title, title)
        else:
            self._print(f"{title}: done after {duration(event.seconds or 0.0)}", "green")

    def _progress(self, event: Progress) -> None:
        slot = "runners" if event.name.startswith(("rollouts", "validation")) else event.name
        if event.done >= event.total:
            if slot == event.name:
                self._drop(slot)
            return
        counts = f"{event.done:g}/{event.total:g}" if event.total != 100 else f"{event.done:g} %"
        title = event.name if slot == event.name else f"{slot}: {event.name}"
        self._bar(slot, title, True, event.done, event.total, f"{counts}  {event.detail}")

    def _step(self, event: StepDone) -> None:
        if self._lines % HEADER_EVERY == 0:
            self._print(header(self._console.width), "bold")
        self._lines += 1
        self._print(aligned(event, self._console.width), None)
        left = self._time_left(event)
        counts = f"{event.step}/{event.steps}  {left}"
        self._bar("steps", "steps", True, event.step, event.steps, counts)
        if event.step >= event.steps:
            self._drop("steps")

    def _time_left(self, event: StepDone) -> str:
        now = time.monotonic()
        if self._first_step is None:
            self._first_step = (event.step, now)
            return ""
        first, since = self._first_step
        per_step = (now - since) / max(1, event.step - first)
        return f"about {duration(per_step * (event.steps - event.step))} left"

    def _done(self, event: Done) -> None:
        if "validation" in event.summary:
            self._live.stop()
            width = min(self._console.width, 120)
            text = render_summary(event.summary, width, self._config_file)
            # Commands and paths stay in one piece, to be copied.
            self._console.print(Text(text), soft_wrap=True)

    def _bar(
        self,
        name: str,
        title: str,
        busy: bool = True,
        done: float | None = None,
        total: float | None = None,
        state: str = "",
    ) -> None:
        """Show or move the bar `name`: with a total up to `done`, without one to and fro, or empty when not `busy`."""
        shown = f"{title:<{TITLE_WIDTH}}"
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(shown, total=None, state=state)
        task = self._bars.tasks[self._bars.task_ids.index(self._tasks[name])]
        task.total = total if busy else 1.0
        self._bars.update(task.id, description=shown, completed=done or 0.0, state=state)

    def _clear(self) -> None:
        for name in list(self._tasks):
            self._drop(name)

    def _drop(self, name: str) -> None:
        if name in self._tasks:
            self._bars.remove_task(self._tasks.pop(name))

    def _print(self, line: str, style: str | None) -> None:
        self._console.print(Text(line, style=style or ""), soft_wrap=True)
