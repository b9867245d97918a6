"""Fork server: has the agent imported, and makes a fresh process for each rollout in some 20 ms of CPU.

    python -m agl_ray.agents.fork_server CONTROL < Source

`agl_ray.agents.processes` starts one per runner, with the file descriptor of a socket (CONTROL) over which datagrams go:

    ready | failed TEXT                          once, when the agent is imported
    start KEY  (with a line and an output)       make a process; it talks over its line (`wire`), prints into its output
    end KEY SIGNAL                               send SIGNAL to the process and its group
    ended KEY STATUS                             it is over (STATUS as os.waitpid gives it), and so is all that it had started

Descendants are found wherever they hide: each process leads a session of its own and is a subreaper, and so is this server; a child
that it has not made has lost all its ancestors, so its rollout is over and it is ended. When the runner goes, everything goes.
It has one thread, so that forking is safe; where importing the agent starts others, it is imported in each process instead. Linux only.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

import msgspec

from agl_ray.agents.fork_child import Loaded, load, run_child, subreaper
from agl_ray.agents.wire import Source

LATE = "AGL_FORK_SERVER_LATE"  # set: the agent is imported in each process
SETTLE = 0.5
LONGEST = 4096  # bytes of a datagram


class ForkServer:
    """See the module's text. loaded: gives the agent in a new process."""

    def __init__(self, control: socket.socket, loaded: Callable[[], Loaded]) -> None:
        self._control, self._loaded = control, loaded
        self._keys: dict[int, int] = {}  # pid -> key
        self._wake, self._wakes = socket.socketpair()

    def serve(self) -> None:
        """Until the runner closes its end."""
        self._wake.setblocking(False)
        self._wakes.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select()}
                if self._wake in ready:
                    self._wake.recv(4096)
                    self._reap()
                if self._control in ready and not self._obey():
                    return

    def _obey(self) -> bool:
        """One order; False when there will be no more."""
        message, fds, _, _ = socket.recv_fds(self._control, LONGEST, 2)
        if not message:
            return False
        word, *rest = message.decode().split()
        key = int(rest[0])
        if word == "start":
            self._start(key, *fds)
        else:
            self._signal(key, int(rest[1]))
        return True

    def _start(self, key: int, line: int, output: int) -> None:
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for each in (self._control, self._wake, self._wakes):
                each.close()
            run_child(line, output, self._loaded)
        self._keys[pid] = key
        os.close(line)
        os.close(output)

    def _signal(self, key: int, number: int) -> None:
        for pid, known in self._keys.items():
            if known == key:
                _kill(pid, number)

    def _reap(self) -> None:
        """Take note of what has ended, and end what it has left."""
        with contextlib.suppress(ChildProcessError):
            while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if found.si_pid in self._keys:
                    _kill(found.si_pid, signal.SIGKILL)  # its group; its number is not free yet
                pid, status = os.waitpid(found.si_pid, 0)
                self._sweep()
                key = self._keys.pop(pid, None)
                if key is not None:
                    self._control.send(f"ended {key} {status}".encode())

    def _sweep(self) -> None:
        """End the children that are no rollout's: all their own ancestors are gone."""
        for pid in _children():
            if pid not in self._keys:
                _kill(pid, signal.SIGKILL)

    def end_all(self) -> None:
        """End every process; those that lose their ancestors by it are found next."""
        self._keys.clear()
        while pids := _children():
            for pid in pids:
                _kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-1, 0)


def _children() -> list[int]:
    """This process's children (it has one thread), zombies included."""
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return [int(pid) for pid in text.split()]


def _kill(pid: int, number: int) -> None:
    """Signal the process and the group that it leads, if it does."""
    for send in (os.kill, os.killpg):
        with contextlib.suppress(ProcessLookupError):
            send(pid, number)


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    body = sys.stdin.buffer.read()
    source = msgspec.msgpack.decode(body, type=Source)
    loaded = _prepared(source, body, control)
    if loaded is None:
        return
    subreaper()
    server = ForkServer(control, loaded)
    control.send(b"ready")
    try:
        server.serve()
    finally:
        server.end_all()


def _prepared(source: Source, body: bytes, control: socket.socket) -> Callable[[], Loaded] | None:
    """How a new process gets the agent: it is here already, or is imported there. None: it cannot be imported, as `control` was told."""
    if os.environ.pop(LATE, None):
        return lambda: load(source)
    before = _threads().keys()
    try:
        loaded = load(source)
    except Exception as error:  # noqa: BLE001  the runner raises it
        control.send(f"failed {type(error).__name__}: {error}".encode()[:LONGEST])
        return None
    others = _lasting(before)
    if others:
        _again_late(body, others)
    return lambda: loaded


def _threads() -> dict[str, str]:
    """Id -> name of this process's threads. jemalloc's, which comes with Arrow, takes care of forks by itself."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            found[task.name] = (task / "comm").read_text().strip()
    return {number: name for number, name in found.items() if name != "jemalloc_bg_thd"}


def _lasting(before: Collection[str]) -> list[str]:
    """Names of the threads that were not there before and have not gone SETTLE seconds later (libraries start some for a moment)."""
    deadline = time.monotonic() + SETTLE
    while (new := _threads().keys() - before) and time.monotonic() < deadline:
        time.sleep(SETTLE / 20)
    return [name for number, name in _threads().items() if number in new]


def _again_late(body: bytes, threads: list[str]) -> None:
    """Begin anew in this very process, without the agent."""
    text = f"agl_ray: importing the agent starts threads ({', '.join(threads)})"
    print(f"{text}; it is imported in every process, which takes longer", flush=True)
    back, front = os.pipe()
    if os.fork() == 0:  # a source may be larger than what a pipe holds
        os.close(back)
        with open(front, "wb") as pipe:
            pipe.write(body)
        os._exit(0)
    os.close(front)
    os.dup2(back, 0)
    os.environ[LATE] = "1"
    os.execv(sys.executable, [sys.executable, "-m", "agl_ray.agents.fork_server", sys.argv[1]])


if __name__ == "__main__":
    main()
