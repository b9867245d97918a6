"""The process of one rollout: made by a fork server, it runs the agent, sends what is recorded, and is gone.

Called by `agl_ray.agents.fork_server`, which runs `run_child` right after the fork. Nothing here returns to the server's code. Test alone:
tests/unit/test_agents_processes.py.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import pickle
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import msgspec
from opentelemetry.trace import SpanContext, TraceFlags

from agl_ray.agents.agent import LitAgent
from agl_ray.agents.execute import Place, run_agent
from agl_ray.agents.hooks import Hook
from agl_ray.agents.loading import load_agent
from agl_ray.agents.wire import HEAD, End, Job, Rows, Source, framed, size_of
from agl_ray.tracing import SpanRecorder
from agl_ray.types import Record

_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36  # of Linux's prctl


class Loaded(NamedTuple):
    """An agent, imported, and the hooks around it."""

    agent: LitAgent
    hooks: tuple[Hook, ...]


def load(source: Source) -> Loaded:
    """Import what `source` names. InputError as from `load_object` and `as_agent`."""
    agent, hooks = pickle.loads(source.pickled)
    return Loaded(load_agent(agent or source.name, source.base, source.instruments), hooks)


def subreaper() -> None:
    """Become the parent of descendants whose own parents end."""
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def run_child(line: int, output: int, loaded: Callable[[], Loaded]) -> NoReturn:
    """Run the job that comes over `line`, with what is printed going into `output`; ends this process."""
    status = 1
    try:
        _settle_in(output)
        sending = _Line(socket.socket(fileno=line))
        job = sending.job()
        sending.send(asyncio.run(_run(job, loaded(), sending)))
        status = 0
    except BaseException:  # noqa: BLE001  this must not come out into the server's code; its text is the end of the output
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # not sys.exit: threads that the agent has left would be waited for


async def _run(job: Job, loaded: Loaded, line: _Line) -> End:
    recorder = SendingRecorder(job, line)
    outcome = await run_agent(
        loaded.agent,
        job.attempt,
        dict(job.resources),
        recorder,
        job.timeout_seconds,
        hooks=loaded.hooks,
        host=job.host,
        place=Place.HERE,
    )
    recorder.end()
    return End(outcome=outcome, lost=dict(recorder.lost))


def _settle_in(output: int) -> None:
    """A session of its own, ended with its server; own standard streams; random numbers unlike those of the other processes."""
    os.setsid()
    subreaper()
    ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(nothing)
    os.close(output)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    for name in ("numpy.random", "torch"):  # Python's own is seeded anew at a fork
        if name in sys.modules:
            sys.modules[name].seed()


class _Line:
    """Frames to the runner, whole ones from any thread."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._lock = threading.Lock()

    def job(self) -> Job:
        with self._end.makefile("rb") as file:
            body = file.read(size_of(file.read(HEAD)))
        return msgspec.msgpack.decode(body, type=Job)

    def send(self, record: Record) -> None:
        frame = framed(record)
        with self._lock:
            self._end.sendall(frame)


class SendingRecorder(SpanRecorder):
    """Sends each row as it is recorded: an agent that is ended keeps none. Its spans are of the runner's own trace."""

    def __init__(self, job: Job, line: _Line) -> None:
        attempt = job.attempt
        super().__init__(attempt.rollout_id, attempt.attempt_id, otlp_endpoint=job.otlp_endpoint)
        trace_id, span_id = (int.from_bytes(part, "big") for part in (job.root[:16], job.root[16:]))
        self.root = SpanContext(trace_id, span_id, False, TraceFlags(1))
        self.join(self.root.trace_id)
        self._line = line
        self._all: list[dict[str, Any]] = []
        self.on_many = self.flush

    def add_row(self, row: dict[str, Any]) -> None:
        super().add_row(row)
        self.flush()

    def rows(self) -> list[dict[str, Any]]:
        """Every row so far."""
        return [*self._all, *super().rows()]

    def flush(self) -> None:
        """Send what has not been sent."""
        self._send(self.take())

    def end(self) -> None:
        """End the recording and send the rest."""
        self._send(self.close())

    def _send(self, rows: list[dict[str, Any]]) -> None:
        self._all += rows
        if rows:
            self._line.send(Rows(rows=rows))
