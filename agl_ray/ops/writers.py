"""Metrics of a run to TensorBoard, Weights & Biases, MLflow: each writer in a thread of its own, behind the files of the run folder.

    controller --> metrics.jsonl, validation.jsonl --> one Lane per writer --> TensorBoard | W&B | MLflow

The files are the queue and the truth. A lane remembers how many of their rows its writer has (`RUN_FOLDER/writers/NAME.json`), so a
writer that fails, hangs or dies with the process goes on where it was: nothing is written twice, nothing is left out. A failure never
reaches the run: it is counted, told once, and tried again with the next row. Used by the controller and by `agl-ray sft`.
Test alone: tests/unit/test_ops_writers.py.
"""

from __future__ import annotations

import functools
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from agl_ray.ops.metric_groups import step_values, validation_values
from agl_ray.ops.metrics import FILE_NAME, VALIDATION_FILE, MetricsWriter, read_metrics

log = logging.getLogger(__name__)

FOLDER = "writers"
GROUPED = {FILE_NAME: step_values, VALIDATION_FILE: validation_values}
TOLD = 300  # characters of an error that a notice shows


class Place(msgspec.Struct):
    """What a writer has. run: its own id of this run, None before it has one. rows: by file, how many rows are written."""

    run: str | None = None
    rows: dict[str, int] = {}


class Writer(Protocol):
    """One destination. Any exception of its methods is a failure that is counted; the next call is then `open` again."""

    name: str

    def open(self, place: Place) -> Place:
        """Go on with the run of `place`, or begin it where `place.run` is None; returns where it stands."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Points of `step` under their grouped names (`train/loss`)."""

    def close(self, ok: bool) -> None:
        """The run is over, well or not."""


class Lane:
    """The thread of one writer. tell: called from it with sentences for the person."""

    def __init__(self, writer: Writer, folder: Path, tell: Callable[[str], None]) -> None:
        self.writer, self.failures = writer, 0
        self._folder, self._tell = folder, tell
        self._file = folder / FOLDER / f"{writer.name}.json"
        self._place = Place()
        self._open = self._down = False
        self._ended: bool | None = None  # then: whether the run ended well
        self._more = threading.Event()
        self._thread = threading.Thread(
            target=self._work, name=f"metrics-{writer.name}", daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There are new rows."""
        self._more.set()

    def end(self, ok: bool) -> None:
        """Write what is left and close."""
        self._ended = ok
        self._more.set()

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    @property
    def missing(self) -> int:
        """Rows that the writer does not have."""
        return sum(len(read_metrics(self._folder, n, self._place.rows.get(n, 0))) for n in GROUPED)

    def _work(self) -> None:
        while True:
            self._more.wait()
            self._more.clear()
            ended = self._ended
            self._try(self._write_rows)
            if ended is not None:
                if self._open:
                    self._try(functools.partial(self.writer.close, ended))
                return

    def _write_rows(self) -> None:
        if not self._open:
            if self._file.exists():
                self._place = msgspec.json.decode(self._file.read_bytes(), type=Place)
            self._place = self.writer.open(self._place)
            self._open = True
            self._keep()
        for name, grouped in GROUPED.items():
            for row in read_metrics(self._folder, name, self._place.rows.get(name, 0)):
                self.writer.write(int(row["step"]), grouped(row))
                self._place.rows[name] = self._place.rows.get(name, 0) + 1
                self._keep()

    def _keep(self) -> None:
        self._file.parent.mkdir(exist_ok=True)
        fresh = self._file.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode(self._place))
        fresh.replace(self._file)

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # whatever a writer's library raises must not reach the run
            self.failures += 1
            self._open = False
            log.warning("metrics writer %s failed", self.writer.name, exc_info=error)
            if not self._down:
                self._down = True
                words = " ".join(f"{type(error).__name__}: {error}".split())[:TOLD]
                self._tell(
                    f"metrics writer {self.writer.name} failed ({words}); the run goes on, its metrics are in {FILE_NAME}, and the "
                    "writer is tried again with each step"
                )


class MetricsBoard:
    """metrics.jsonl and validation.jsonl of a run folder, and the writers that follow them."""

    def __init__(
        self, folder: Path, writers: Sequence[Writer] = (), tell: Callable[[str], None] = log.info
    ) -> None:
        self._tell = tell
        self._steps = MetricsWriter(folder)
        self._validations = MetricsWriter(folder, VALIDATION_FILE)
        self._lanes = [Lane(writer, folder, tell) for writer in writers]
        self._started = False

    def begin(self, step: int) -> None:
        """Drop the rows after `step`, which a resumed run writes again, and start the writers."""
        self._steps.cut(step)
        self._validations.cut(step)
        for lane in self._lanes:
            lane.start()
            lane.wake()
        self._started = True

    def write(self, row: Mapping[str, Any]) -> None:
        """One training step."""
        self._steps.write(row)
        self._wake()

    def validated(self, row: Mapping[str, Any]) -> None:
        """One validation; one of the same step that is there already is replaced."""
        self._validations.cut(int(row["step"]) - 1)
        self._validations.write(row)
        self._wake()

    def _wake(self) -> None:
        for lane in self._lanes:
            lane.wake()

    @property
    def failures(self) -> dict[str, int]:
        """Failed attempts of each writer that had any."""
        return {lane.writer.name: lane.failures for lane in self._lanes if lane.failures}

    def close(self, ok: bool, seconds: float) -> None:
        """Let the writers write what is left, for at most `seconds` together; tells of each that misses rows. Blocks; a second call
        tells nothing new."""
        lanes, self._lanes = self._lanes, []
        if not self._started:
            return
        deadline = time.monotonic() + seconds
        for lane in lanes:
            lane.end(ok)
        for lane in lanes:
            lane.join(max(0.0, deadline - time.monotonic()))
            about = f"metrics writer {lane.writer.name}"
            if missing := lane.missing:
                self._tell(
                    f"{about} misses {missing} rows after {lane.failures} failures; they are in {FILE_NAME} and {VALIDATION_FILE}, "
                    "and it takes them from there when the run is resumed"
                )
            elif lane.failures:
                self._tell(f"{about} has all rows after {lane.failures} failures")


def hyperparameters(resolved: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """A configuration as flat `section.key` values: lists as JSON, nothing for null."""
    flat: dict[str, bool | int | float | str] = {}
    for name, value in resolved.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}.{key}": inner for key, inner in hyperparameters(value).items()})
        elif value is not None:
            flat[name] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return flat
