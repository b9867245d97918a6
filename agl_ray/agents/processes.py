"""Agents in processes of their own: the runner's side of its fork server.

    processes = await AgentProcesses.start(source)
    outcome = await processes.run(attempt, resources, recorder, timeout_seconds, host)
    await processes.close()

Called by the runner actor where `runners.isolation` is process. Works on any asyncio loop; Linux only. Test alone:
tests/unit/test_agents_processes.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from typing import Any, BinaryIO

import msgspec

from agl_ray.agents.calling import LEAVE
from agl_ray.agents.execute import NO_HOST, Host, overrun
from agl_ray.agents.outcome import Outcome
from agl_ray.agents.tail import PIECE, Tail
from agl_ray.agents.wire import HEAD, End, Job, Rows, Source, framed, size_of
from agl_ray.spans import KIND_SPAN
from agl_ray.tracing import SpanRecorder
from agl_ray.types import AttemptedRollout, EndReason, InputError, NamedResources, RunError
from agl_ray.waits import wait

OUTPUT_SPAN = "agl_ray.output"
START = 120.0  # seconds to import the agent
KILL = 2.0  # seconds between SIGTERM and SIGKILL
GONE = 10.0  # seconds for a killed process to be gone
LONGEST = 4096  # bytes of a datagram


class AgentProcesses:
    """See the module's text. `failure` is an error from the moment on that the fork server is gone without having been closed."""

    def __init__(self, server: asyncio.subprocess.Process, control: socket.socket) -> None:
        self._server, self._control = server, control
        self._ended: dict[int, asyncio.Future[int]] = {}
        self._next = 0
        self._closing = False
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._listening = asyncio.ensure_future(self._listen())

    @classmethod
    async def start(cls, source: Source) -> AgentProcesses:
        """A fork server that has imported the agent. InputError where it cannot."""
        if not sys.platform.startswith("linux"):
            raise InputError(
                f"runners.isolation: process needs Linux, this is {sys.platform}; use thread, or an agent that is a command"
            )
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        here.setblocking(False)
        path = os.pathsep.join(each for each in sys.path if each)
        server = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "agl_ray.agents.fork_server", str(there.fileno())),
            stdin=asyncio.subprocess.PIPE,
            pass_fds=[there.fileno()],
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
        there.close()
        assert server.stdin is not None
        server.stdin.write(msgspec.msgpack.encode(source))
        server.stdin.close()
        asking = asyncio.get_running_loop().sock_recv(here, LONGEST)
        said = (await wait(asking, on="the agent to be imported", seconds=START)).decode()
        if said != "ready":
            here.close()
            await wait(server.wait(), on="the fork server to end", seconds=GONE)
            raise InputError(said.removeprefix("failed ") or "the agent's fork server died")
        return cls(server, here)

    async def _listen(self) -> None:
        """Hand out what the server says, until it goes."""
        loop = asyncio.get_running_loop()
        while message := await loop.sock_recv(self._control, LONGEST):
            _, key, status = message.split()
            ended = self._ended.get(int(key))
            if ended is not None and not ended.done():
                ended.set_result(int(status))
        if not self._closing and not self.failure.done():
            self.failure.set_exception(RunError("the fork server of the agents' processes died"))

    async def run(
        self,
        attempt: AttemptedRollout,
        resources: NamedResources,
        recorder: SpanRecorder,
        timeout_seconds: float,
        host: Host = NO_HOST,
    ) -> Outcome:
        """Run the agent in a fresh process, ended with all that it has started LEAVE seconds after the deadline, or when this is cancelled.

        What it records goes into `recorder` as it comes, at last the end of what it printed.
        """
        root = recorder.root
        job = Job(
            attempt=attempt,
            resources=resources,
            host=host,
            timeout_seconds=timeout_seconds,
            root=root.trace_id.to_bytes(16, "big") + root.span_id.to_bytes(8, "big"),
            otlp_endpoint=recorder.otlp_endpoint,
        )
        key, self._next = self._next, self._next + 1
        ended = self._ended[key] = asyncio.get_running_loop().create_future()
        late = False
        try:
            talk = await self._begin(key, job, recorder)
            try:
                late = not await self._over(ended, timeout_seconds + LEAVE)
            finally:
                await self._end(key, ended)
                await talk.close()
        finally:
            del self._ended[key]
        if talk.tail.num_bytes:
            said = {"bytes": talk.tail.num_bytes, "tail": talk.tail.text}
            recorder.add(name=OUTPUT_SPAN, kind=KIND_SPAN, attributes=said)
        outcome = talk.outcome()
        if outcome is None and late:
            return overrun(timeout_seconds)
        return outcome or _died(ended.result(), talk.tail)

    async def _begin(self, key: int, job: Job, recorder: SpanRecorder) -> _Talk:
        """Have a process made. Should this be cancelled, it finds no job and goes."""
        here, there = socket.socketpair()
        back, front = os.pipe()
        output = os.fdopen(back, "rb", buffering=0)
        try:
            await self._tell(f"start {key}", [there.fileno(), front])
            return await _Talk.open(here, output, job, recorder)
        except BaseException:
            here.close()
            output.close()
            raise
        finally:
            there.close()
            os.close(front)

    async def _tell(self, text: str, fds: list[int] | None = None) -> None:
        """Send the server a datagram, once there is room."""
        while True:
            try:
                socket.send_fds(self._control, [text.encode()], fds or [])
                return
            except BlockingIOError:
                await wait(self._writable(), on="the fork server to take an order", seconds=GONE)

    async def _writable(self) -> None:
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        loop.add_writer(self._control, lambda: None if ready.done() else ready.set_result(None))
        try:
            await ready
        finally:
            loop.remove_writer(self._control)

    async def _end(self, key: int, ended: asyncio.Future[int]) -> None:
        """See that a process is gone: SIGTERM, and SIGKILL for what does not heed it."""
        for number, seconds in ((signal.SIGTERM, KILL), (signal.SIGKILL, GONE)):
            if ended.done() or self.failure.done():
                return
            with contextlib.suppress(
                BrokenPipeError
            ):  # the server has gone, and its processes with it
                await self._tell(f"end {key} {int(number)}")
            await self._over(ended, seconds)
        if not ended.done() and not self.failure.done():
            raise RunError(
                "a process of the agent could not be ended; its fork server does not answer"
            )

    async def _over(self, ended: asyncio.Future[int], seconds: float) -> bool:
        """Whether a process is gone within `seconds`. RunError where the fork server is, and its processes with it."""
        either: set[asyncio.Future[Any]] = {ended, self.failure}
        await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if self.failure.done() and not ended.done():
            self.failure.result()
        return ended.done()

    async def close(self) -> None:
        """End the server and every process that is left."""
        self._closing = True
        self._listening.cancel()
        self._control.close()
        self.failure.cancel()
        await wait(self._server.wait(), on="the fork server to end", seconds=GONE)


class _Talk:
    """What a process says and prints, taken up as it comes."""

    def __init__(
        self,
        heard: asyncio.Task[Outcome | None],
        printed: asyncio.Task[None],
        tail: Tail,
        *ends: Any,
    ) -> None:
        self._heard, self._printed, self.tail, self._ends = heard, printed, tail, ends

    @classmethod
    async def open(
        cls, line: socket.socket, output: BinaryIO, job: Job, recorder: SpanRecorder
    ) -> _Talk:
        loop = asyncio.get_running_loop()
        prints = asyncio.StreamReader(limit=PIECE)
        pipe, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(prints), output)
        try:
            reader, writer = await asyncio.open_unix_connection(sock=line)
        except BaseException:
            pipe.close()  # it is the loop's by now: to close the file alone would leave its number there
            raise
        writer.write(framed(job))
        tail = Tail()
        heard = asyncio.ensure_future(_hear(reader, recorder))
        return cls(heard, asyncio.ensure_future(tail.read(prints)), tail, pipe, writer)

    async def close(self) -> None:
        """Nobody is left to speak: what was written is there."""
        await asyncio.wait({self._heard, self._printed}, timeout=LEAVE)
        for task in (self._heard, self._printed):
            task.cancel()
        for end in self._ends:
            end.close()

    def outcome(self) -> Outcome | None:
        """What the process said of its end; None where it went without a word."""
        heard = self._heard
        return heard.result() if heard.done() and not heard.cancelled() else None


async def _hear(line: asyncio.StreamReader, recorder: SpanRecorder) -> Outcome | None:
    """Put what a process records into `recorder`, until it says its outcome; None where it goes without."""
    try:
        while True:
            body = await line.readexactly(size_of(await line.readexactly(HEAD)))
            frame = msgspec.msgpack.decode(body, type=Rows | End)
            if isinstance(frame, End):
                for reason, number in frame.lost.items():
                    recorder.lose(reason, number)
                return frame.outcome
            for row in frame.rows:
                recorder.add_row(row)
    except (asyncio.IncompleteReadError, ConnectionResetError, msgspec.MsgspecError):
        return None


def _died(status: int, tail: Tail) -> Outcome:
    """The outcome of a process that went without a word."""
    code = os.waitstatus_to_exitcode(status)
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    said = f"; it last printed: {tail.last_lines()}" if tail.num_bytes else ""
    text = f"the agent's process {how} before the agent returned{said}"
    return Outcome(reason=EndReason.AGENT_ERROR, error=text)
