"""Transfer groups: how the bytes of a bucket get from the learner to every engine at once.

Called by: `sender.py` (rank 0) and `receiver.py` (ranks 1...). A group is a Gloo (CPU) or NCCL (GPU) communicator built over a TCPStore that lives in
the sender's process; it is kept from version to version while its members stay the same, and built anew when they change.
Joining can be interrupted from either side; a broadcast ends at the latest at the group's time limit. Neither hangs.
Test alone: `pytest tests/unit/test_weights_transports.py` (two threads, one machine).
"""

from __future__ import annotations

import socket
import threading
import time
import uuid
from datetime import timedelta
from typing import Any, Literal

import msgspec
import torch
import torch.distributed as dist

from agl_ray.types.errors import WeightSyncError

Backend = Literal["gloo", "nccl"]


class GroupSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One member's view of a transfer group. All members share `id`, `backend`, `host`, `port`, `world`."""

    id: str
    backend: Backend
    host: str
    port: int
    rank: int
    """0 is the sender."""
    world: int
    seconds: float
    """Time limit of each broadcast."""
    join_seconds: float
    """Time limit of joining: short, since all members are asked at the same moment."""


class TransferGroup:
    """An open communicator. Made by `Channel.group`; not thread-safe."""

    def __init__(self, spec: GroupSpec, interrupt: threading.Event) -> None:
        limit = timedelta(seconds=spec.seconds)
        self.spec = spec
        self._limit = limit
        self._device = torch.device("cuda" if spec.backend == "nccl" else "cpu")
        try:
            self._join(interrupt)
        except (RuntimeError, OSError) as error:
            if isinstance(error, WeightSyncError):
                raise
            raise WeightSyncError(
                f"joining transfer group {spec.id} at {spec.host}:{spec.port} failed: {error}"
            ) from error

    def _join(self, interrupt: threading.Event) -> None:
        spec, limit = self.spec, self._limit
        # A TCPStore client tries a refused port again and again; a sender that is gone should be noticed now.
        socket.create_connection((spec.host, spec.port), timeout=spec.join_seconds).close()
        self._store = dist.TCPStore(
            spec.host,
            spec.port,
            is_master=False,
            timeout=timedelta(seconds=spec.join_seconds),
            wait_for_workers=False,
        )
        scope = dist.PrefixStore(spec.id, self._store)
        _meet(scope, spec, interrupt)
        self._pg: Any = (
            _nccl(scope, spec, limit) if spec.backend == "nccl" else _gloo(scope, spec, limit)
        )

    def broadcast(self, flat: torch.Tensor) -> None:
        """Bring rank 0's bytes into `flat` (uint8, CPU, contiguous; the same size everywhere) of every member."""
        on_device = flat.to(self._device)
        try:
            self._pg.broadcast(on_device, 0).wait(self._limit)
        except RuntimeError as error:
            raise WeightSyncError(
                f"the {self.spec.backend} broadcast to {self.spec.world - 1} engines broke (a peer died or is stuck): {error}"
            ) from error
        if on_device is not flat and self.spec.rank != 0:
            flat.copy_(on_device)

    def close(self) -> None:
        """Give the connections back. The group cannot be used afterwards."""
        if self.spec.backend == "nccl":
            self._pg.abort()
        self._pg = self._store = None


class Channel:
    """The one transfer group that a process holds open, kept while the same group is asked for again."""

    def __init__(self) -> None:
        self._group: TransferGroup | None = None
        self._wanted: str | None = None  # the group that is held or being joined
        self._interrupt = threading.Event()
        self._lock = threading.Lock()

    def group(self, spec: GroupSpec) -> TransferGroup:
        """The open group of `spec`: the held one if it is the same, else the held one is closed and the new one joined.

        A join that is still under way in another thread for an older group is interrupted. WeightSyncError when the members do not
        meet in time."""
        with self._lock:
            held = self._group
            if held is not None and held.spec.id == spec.id:
                return held
            self._interrupt.set()
            self._interrupt = interrupt = threading.Event()
            self._group, self._wanted = None, spec.id
        if held is not None:
            held.close()
        group = TransferGroup(spec, interrupt)
        with self._lock:
            if interrupt.is_set():
                raise WeightSyncError(
                    f"transfer group {spec.id} was superseded while it was joined"
                )
            self._group = group
        return group

    def drop(self, group: str | None = None) -> None:
        """Close what is held and interrupt what is being joined: after a failure a group is never used again.

        group: only if that is the one; a failure of an older group, told late, must not end the newer one."""
        with self._lock:
            if group not in (None, self._wanted):
                return
            self._interrupt.set()
            held, self._group = self._group, None
        if held is not None:
            held.close()


def _meet(scope: Any, spec: GroupSpec, interrupt: threading.Event) -> None:
    """Wait until every member is there, so that building the communicator itself cannot block on a dead peer."""
    scope.set(f"here/{spec.rank}", "1")
    everyone = [f"here/{rank}" for rank in range(spec.world)]
    deadline = time.monotonic() + spec.join_seconds
    pause = 0.001
    while not scope.check(everyone):
        if interrupt.is_set():
            scope.set("given-up", "1")
            raise WeightSyncError(f"joining transfer group {spec.id} was given up for a newer one")
        if scope.check(["given-up"]):
            raise WeightSyncError(f"another member gave up transfer group {spec.id}")
        if time.monotonic() > deadline:
            missing = [key.removeprefix("here/") for key in everyone if not scope.check([key])]
            raise WeightSyncError(
                f"ranks {', '.join(missing)} of {spec.world} did not join transfer group {spec.id} within {spec.join_seconds:g} s"
            )
        # Asked rather than waited for: a blocking wait cannot be interrupted, and c10d logs each time it runs out.
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


def _gloo(scope: Any, spec: GroupSpec, limit: timedelta) -> Any:
    options = dist.ProcessGroupGloo._Options()
    # Bind to the address that the other nodes know this one by; the host's own name may resolve to loopback.
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=own_address(spec.host))]
    options._timeout = limit
    return dist.ProcessGroupGloo(scope, spec.rank, spec.world, options)


def _nccl(scope: Any, spec: GroupSpec, limit: timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = limit
    return dist.ProcessGroupNCCL(scope, spec.rank, spec.world, options)


def own_address(peer: str) -> str:
    """The address of this machine on the route to `peer` (no packet is sent)."""
    family = socket.AF_INET6 if ":" in peer else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))
        return str(probe.getsockname()[0])


class _Rendezvous:
    """The TCPStore server of this process and a name for it; made once, on first use."""

    def __init__(self) -> None:
        self.sender = uuid.uuid4().hex[:12]
        self._server = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
        self.port = int(self._server.port)


_rendezvous: _Rendezvous | None = None
_rendezvous_lock = threading.Lock()


def rendezvous() -> _Rendezvous:
    """This process's rendezvous store for the groups it sends to."""
    global _rendezvous
    with _rendezvous_lock:
        if _rendezvous is None:
            _rendezvous = _Rendezvous()
        return _rendezvous
