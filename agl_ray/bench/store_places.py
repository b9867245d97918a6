"""Where the measured store lives: in this process, in a Ray actor, or behind HTTP in a process of its own.

Each place is an async context manager that gives a client and the id of the process that holds the store, so that a measurement can
ask for its CPU time and its memory. Called by `agl_ray.bench.store*`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import sys
from collections.abc import AsyncIterator, Iterator
from typing import NamedTuple

import psutil

from agl_ray.store import LightningStore, StoreCore
from agl_ray.store.doors.http_transport import HttpTransport
from agl_ray.types import RunError, WaitTimeout
from agl_ray.waits import wait

NAMESPACE = "bench-store"
END_SECONDS = 60.0


class Place(NamedTuple):
    """pid: of the process that holds the store (our own where it is in process)."""

    store: LightningStore
    pid: int


@contextlib.asynccontextmanager
async def in_process(
    url: str, cache_mib: float = 256.0, lease_seconds: float = 30.0
) -> AsyncIterator[Place]:
    """A core on this event loop."""
    core = await StoreCore.open(url, cache_mib=cache_mib, lease_seconds=lease_seconds)
    try:
        yield Place(LightningStore.local(core), os.getpid())
    finally:
        await core.close()


@contextlib.asynccontextmanager
async def in_actor(url: str, cache_mib: float = 256.0) -> AsyncIterator[Place]:
    """The actor of a run, on the Ray of `local_ray`."""
    import ray

    from actors.store import create_store

    name = f"store-{secrets.token_hex(4)}"
    store = create_store(name, NAMESPACE, url, cache_mib=cache_mib)
    try:
        handle = ray.get_actor(name, namespace=NAMESPACE)
        pid = await wait(handle.pid.remote(), on=f"{name} to tell its pid", seconds=30)
        yield Place(store, pid)
    finally:
        on = f"{name} to close its journal"
        await wait(store.shutdown(), on=on, seconds=END_SECONDS)


@contextlib.asynccontextmanager
async def over_http(url: str, cache_mib: float = 256.0) -> AsyncIterator[Place]:
    """`agl-ray store serve` in a process of its own."""
    command = [sys.executable, "-m", "agl_ray.cli", "store", "serve", url, "--port", "0"]
    server = await asyncio.create_subprocess_exec(
        *command, "--cache-mib", str(cache_mib), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert server.stdout is not None
        reading = server.stdout.readline()
        line = await wait(reading, on="agl-ray store serve to say its address", seconds=60)
        address = next(
            (word.strip(",") for word in line.decode().split() if word.startswith("http://")), None
        )
        if address is None:
            raise RunError(f"agl-ray store serve did not start: {line.decode()!r}")
        transport = HttpTransport(address)
        yield Place(LightningStore(transport), server.pid)
        await transport.close()
    finally:
        if server.returncode is None:
            server.terminate()
        try:
            await wait(server.wait(), on="agl-ray store serve to end", seconds=END_SECONDS)
        except WaitTimeout:
            server.kill()
            raise


@contextlib.contextmanager
def local_ray() -> Iterator[None]:
    """A Ray of our own for as long as the block runs; none of its processes outlives it."""
    import ray

    ray.init(
        address="local",
        num_cpus=max(2, os.cpu_count() or 2),
        object_store_memory=256 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        namespace=NAMESPACE,
    )
    started = psutil.Process().children(recursive=True)
    try:
        yield
    finally:
        started += psutil.Process().children(recursive=True)
        ray.shutdown()
        _, alive = psutil.wait_procs(started, timeout=5.0)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


class Meter:
    """CPU seconds of this process and of `pid`, and the share of the machine that everybody else used, between `start` and `stop`."""

    def __init__(self, pid: int) -> None:
        self._processes = [psutil.Process(one) for one in {pid, os.getpid()}]
        self._busy = self._ours = self._wall = 0.0
        self.cpu_seconds = self.foreign_share = self.seconds = 0.0

    def start(self) -> None:
        self._ours, self._busy = self._own(), _machine_busy()
        self._wall = asyncio.get_running_loop().time()

    def stop(self) -> None:
        self.seconds = asyncio.get_running_loop().time() - self._wall
        self.cpu_seconds = self._own() - self._ours
        others = max(0.0, _machine_busy() - self._busy - self.cpu_seconds)
        self.foreign_share = others / (self.seconds * (os.cpu_count() or 1))

    def _own(self) -> float:
        times = [process.cpu_times() for process in self._processes]
        return float(sum(one.user + one.system for one in times))


def _machine_busy() -> float:
    """CPU seconds that all processes of the machine have used."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0))


def memory_mib(pid: int) -> float:
    """Resident memory of a process."""
    return float(psutil.Process(pid).memory_info().rss) / 2**20
