"""A whole run as a person starts it (`agl-ray train`, in a process of its own), for tests that kill parts of it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from processes import command_line, ended

REPO = Path(__file__).resolve().parents[2]
CHATTER = "agl_ray.bench.chatter"

CONFIG = f"""
name: fault
agent: {CHATTER}:chatter
data: {{train: "{CHATTER}:rows", val: "{CHATTER}:rows", fields: [question]}}
rollout: {{groups_per_step: 4, group_size: 4, max_tokens: 12, timeout_seconds: 120, max_attempts: 3}}
validation: {{rows: 8}}
runners: {{num_runners: 2, concurrency: 8, lease_seconds: 20}}
engine: {{max_model_len: 256, max_num_seqs: 32}}
gateway: {{call_timeout_seconds: 100}}
learner: {{max_row_tokens: 256}}
weights: {{timeout_seconds: 120}}
train: {{steps: 8, checkpoint_every: 3}}
cluster: {{local_cpus: 4}}
"""


class WholeRun:
    """`agl-ray train` on a tiny model in `folder`; reads its lines as they come.

    TRAIN is killed (with every process it started) by `close`, which belongs in a fixture's teardown.
    """

    def __init__(self, folder: Path, model: Path, extra: Sequence[str] = ()) -> None:
        self.folder = folder
        self.config = folder / "fault.yaml"
        self.config.write_text(CONFIG)
        self.extra = [f"model.path={model}", f"runs_dir={folder / 'runs'}", *extra]
        self.seen: list[str] = []
        self.family: dict[int, psutil.Process] = {}
        self._lines: queue.Queue[str | None] = queue.Queue()

    def start(self, resume: str | None = None) -> WholeRun:
        words = ["train", str(self.config), *self.extra]
        if resume is not None:
            words += ["--resume", resume]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "agl_ray.cli", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=REPO,
            start_new_session=True,  # a Ctrl-C of the person who runs the tests is not for it
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._lines = queue.Queue()
        threading.Thread(target=self._read, args=(self.process, self._lines), daemon=True).start()
        return self

    @staticmethod
    def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line.rstrip())
        lines.put(None)

    def until(self, pattern: str, seconds: float = 600.0) -> str:
        """The next line that matches; AssertionError with everything seen when it does not come."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(
                    f"no line {pattern!r} within {seconds} s:\n{self.text}"
                ) from None
            if line is None:
                raise AssertionError(f"ended without a line {pattern!r}:\n{self.text}")
            self.seen.append(line)
            self._remember()
            if re.search(pattern, line):
                return line

    def finish(self, seconds: float = 600.0) -> int:
        """The exit code, once the run has ended."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"still running after {seconds} s:\n{self.text}") from None
            if line is None:
                return self.process.wait(timeout=120)
            self.seen.append(line)
            self._remember()

    def _remember(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            children = psutil.Process(self.process.pid).children(recursive=True)
            self.family |= {child.pid: child for child in children}

    def kill(self, title: str) -> int:
        """SIGKILL one process of the run whose command line contains `title`; its pid."""
        self._remember()
        for process in self.family.values():
            if title in command_line(process):
                process.send_signal(signal.SIGKILL)
                return process.pid
        raise AssertionError(f"no process {title!r} among {self.titles()}")

    def titles(self) -> list[str]:
        alive = [p for p in self.family.values() if p.is_running()]
        return [command_line(process)[:60] for process in alive]

    def left_over(self, seconds: float = 60.0) -> list[psutil.Process]:
        """Processes of the run that are still there after so long; at once when all have left."""
        deadline = time.monotonic() + seconds
        while True:
            alive = [process for process in self.family.values() if not ended(process)]
            if not alive or time.monotonic() > deadline:
                return alive
            time.sleep(0.1)

    def interrupt(self) -> None:
        self._remember()
        self.process.send_signal(signal.SIGINT)

    def close(self) -> None:
        if self.process.poll() is None:
            self._remember()
            self.process.kill()
        for process in self.left_over(2.0):
            process.kill()

    @property
    def text(self) -> str:
        return "\n".join(self.seen)

    @property
    def run_folder(self) -> Path:
        return (self.folder / "runs" / "latest").resolve()

    @property
    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.run_folder / "summary.json").read_text())
        return summary
