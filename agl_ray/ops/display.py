"""The one screen of a run: a live one on a terminal, plain timestamped lines elsewhere (a log, `ray job submit`).

The trainer makes one (`make_display()`), enters it, and shows it the events of `agl_ray.ops.events`. Try it without a run:
`python tests/unit/test_ops_display.py` (add `| cat` for the plain one).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, TextIO, TypeVar

from agl_ray.ops.events import Done, Event, Failed, Notice, Phase, Progress, StepDone, Validation
from agl_ray.ops.numbers import duration
from agl_ray.ops.step_line import named, validation_line
from agl_ray.ops.summary_text import render_summary

PROGRESS_EVERY = 10.0  # seconds between plain lines about the same bar

# Phases that come in every step: part of the step's line, no line of their own.
STEP_PHASES = ("rollout", "update", "sync", "checkpoint", "validation")
PHASE_TITLES = {
    "setup": "set-up",
    "sft": "base model",
    "preflight": "trying the agent",
    "export": "exporting the model",
}

Self = TypeVar("Self", bound="Display")


class Display(Protocol):
    """What the trainer needs of a screen: enter it, show events, leave it."""

    def show(self, event: Event) -> None:
        """Show one event."""

    def __enter__(self: Self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def make_display(stream: TextIO | None = None, config_file: str | None = None) -> Display:
    """The live screen where `stream` (stdout) is a terminal that can move its cursor, else plain lines.

    config_file: the file that the person named, for the commands that the last screen proposes.
    """
    stream = stream or sys.stdout
    if stream.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        from agl_ray.ops.live_display import LiveDisplay

        return LiveDisplay(stream, config_file)
    return PlainDisplay(stream, config_file)


class PlainDisplay:
    """Timestamped lines, each flushed: for logs. Bars become a line each `PROGRESS_EVERY` seconds at most."""

    def __init__(
        self,
        stream: TextIO | None = None,
        config_file: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._stream, self._clock = stream or sys.stdout, clock
        self._config_file = config_file
        self._said: dict[str, float] = {}

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.flush()

    def show(self, event: Event) -> None:
        for line in self._lines(event):
            self._say(line)

    def _lines(self, event: Event) -> list[str]:
        match event:
            case Phase():
                return self._phase(event)
            case Progress():
                return self._progress(event)
            case StepDone():
                return [named(event)]
            case Validation():
                return [validation_line(event.step, event.accuracy, event.ci95, event.n)]
            case Notice():
                return [f"notice: {event.text}"]
            case Failed():
                return [f"error: {event.text}"]
            case Done():
                return self._done(event)

    def _done(self, event: Done) -> list[str]:
        # The controller's own end carries facts only; the trainer's carries the summary.
        if "validation" not in event.summary:
            return []
        return render_summary(event.summary, config_file=self._config_file).splitlines()

    def _phase(self, event: Phase) -> list[str]:
        if event.name in STEP_PHASES:
            return []
        title = PHASE_TITLES.get(event.name, event.name)
        if event.state == "start":
            return [f"{title} ..."]
        return [f"{title}: done after {duration(event.seconds or 0.0)}"]

    def _progress(self, event: Progress) -> list[str]:
        now = self._clock()
        since = self._said.setdefault(event.name, now)
        if event.done >= event.total:
            self._said.pop(event.name)
            return []
        if now - since < PROGRESS_EVERY:
            return []
        self._said[event.name] = now
        share = event.done / event.total if event.total else 0.0
        return [f"{event.name}: {100 * share:.0f} %{' ' + event.detail if event.detail else ''}"]

    def _say(self, line: str) -> None:
        stamp = time.strftime("%H:%M:%S", time.localtime(self._clock()))
        print(f"{stamp} {line}".rstrip(), file=self._stream, flush=True)
