"""TensorBoard event files in RUN_FOLDER/tensorboard. Look at them with `tensorboard --logdir runs`.

The files are made anew from metrics.jsonl at each start, so that neither a resumed run nor a torn file shows a point twice. Needs
tensorboard alone, no torch. Made by `agl_ray.ops.writer_choice`; test alone: tests/unit/test_ops_writers.py.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agl_ray.ops.writers import Place

FOLDER = "tensorboard"
PREFIX = "events.out.tfevents."


class TensorBoardWriter:
    """Scalars under their grouped names, the configuration in the HParams tab."""

    name = "tensorboard"

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._folder, self._config = folder / FOLDER, config
        self._run = folder.name
        self._records: Any = None

    def open(self, place: Place) -> Place:
        """A fresh file for all rows; those of earlier starts go."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        for old in self._folder.glob(f"{PREFIX}*"):
            old.unlink()
        name = f"{PREFIX}{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter((self._folder / name).open("wb"))
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        summary = hparams_pb(dict(self._config), trial_id=self._run, start_time_secs=time.time())
        self._add(Event(wall_time=time.time(), summary=summary))
        self._records.flush()
        return Place(run=self._run)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=points)))
        self._records.flush()

    def close(self, ok: bool) -> None:
        self._records.close()

    def _add(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
