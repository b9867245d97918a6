"""Joining a Ray cluster, or starting a local one, and leaving it so that nothing is left behind.

Used by the driver's session. Addresses are checked by a plain TCP connection first: Ray itself would retry an unreachable
one for a minute or more before it says so.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any, TextIO

import psutil
import ray

from agl_ray.config import RunConfig
from agl_ray.types import InputError

CONNECT = 5.0  # seconds for the TCP check of a given address
log = logging.getLogger(__name__)

LEAVE = 3.0  # seconds that local processes get to end after ray.shutdown before they are killed


def cluster_address(config: RunConfig) -> str | None:
    """The address to join: the configuration's, else RAY_ADDRESS (set under `ray job submit`), else None for a local Ray."""
    return config.cluster.address or os.environ.get("RAY_ADDRESS") or None


def check_reachable(address: str) -> None:
    """InputError unless something listens at `address` (`host:port` or `ray://host:port`)."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        raise InputError(
            f"cluster.address: expected host:port or ray://host:port, got {address!r}; "
            "leave it out to start a local Ray"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT).close()
    except OSError as error:
        raise InputError(
            f"cluster.address: no Ray answers at {address} ({error}). Is the cluster up, and the port reachable from here? "
            "Leave cluster.address (and RAY_ADDRESS) out to start a local Ray"
        ) from error


@contextlib.contextmanager
def joined(config: RunConfig, namespace: str, env: dict[str, str]) -> Iterator[None]:
    """Ray, for as long as the block runs. `env` goes to every process of a local Ray, or to every process of this job.

    A local Ray is ended with the block and none of its processes outlives it; a cluster is only left.
    """
    address = cluster_address(config)
    if address is not None:
        check_reachable(address)
    os.environ.update(env)
    ours: dict[int, psutil.Process] = {}
    out, err = _RayLines(sys.stdout), _RayLines(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            _init(config, address, namespace, env)
            _quiet()
            if address is None:
                ours = _children()
            yield
        finally:
            if address is None:
                ours |= _children()
            ray.shutdown()
            _end(ours)


def _init(config: RunConfig, address: str | None, namespace: str, env: dict[str, str]) -> None:
    common: dict[str, Any] = {
        "namespace": namespace,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    if address is not None:
        ray.init(address=address, runtime_env={"env_vars": env}, **common)
        return
    ray.init(
        address="local",
        num_cpus=config.cluster.local_cpus or max(2, os.cpu_count() or 2),
        object_store_memory=config.cluster.object_store_mib * 1024 * 1024,
        include_dashboard=False,
        **common,
    )


class _RayLines(io.TextIOBase):
    """A standard stream without Ray's own lines about dying workers, which go to our log: the run says itself what died and what was done
    about it. (Ray prints them past its own dispatcher, so that nothing but the stream can stop them.)"""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self._swallowed = stream, False

    def write(self, text: str) -> int:
        if "(raylet)" in text:
            log.info("ray: %s", text.strip())
            self._swallowed = not text.endswith("\n")
        elif self._swallowed and text == "\n":
            self._swallowed = False
        else:
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        return not self.stream.closed and self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()


def _quiet() -> None:
    """What Ray says to the terminal about dying workers goes to our log: the run says itself what died and what it did about it."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher
    except ImportError:  # a newer Ray: then its lines show between ours
        log.info("this Ray's messages cannot be redirected")
        return
    dispatcher.remove_handler("ray_print_logs")
    dispatcher.add_handler("ray_print_logs", _log_lines)


def _log_lines(data: dict[str, Any]) -> None:
    for line in data.get("lines", []):
        log.info("ray: %s", str(line).strip())


def _children() -> dict[int, psutil.Process]:
    return {process.pid: process for process in psutil.Process().children(recursive=True)}


def _end(processes: dict[int, psutil.Process]) -> None:
    """End what is left of our own local processes: they were ours before, by PID and start time."""
    _, alive = psutil.wait_procs(list(processes.values()), timeout=LEAVE)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=1.0)
