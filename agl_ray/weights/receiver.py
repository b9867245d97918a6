"""Receiver: takes one weight version into host memory beside whatever the process is doing, and checks it.

Called by: `vllm_plugin.py` inside vLLM's worker process. Receiving runs in a thread while the engine goes on generating; only when the whole
version has arrived and its checksum is right is it given out (`take`), so a broken transfer never touches the model.
Test alone: `pytest tests/unit/test_weights_transports.py`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from agl_ray.types.errors import WeightSyncError
from agl_ray.weights.buckets import Manifest, Verifier, manifest_from_dict, unpack
from agl_ray.weights.transports import Channel, GroupSpec


class _Job:
    """One version on its way in."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.order = order
        self.manifest: Manifest = manifest_from_dict(order["manifest"])
        self.flats: list[torch.Tensor] = []
        self.outcome: dict[str, Any] | None = None


class Receiver:
    """Holds at most one version in the making; a newer order supersedes an older one."""

    def __init__(self) -> None:
        self._channel = Channel()
        self._job: _Job | None = None

    def begin(self, order: dict[str, Any]) -> None:
        """Start to receive what `order` says (keys: manifest, transport, and group or files). Returns at once."""
        job = self._job = _Job(order)
        threading.Thread(
            target=self._run, args=(job,), name="agl-receive-weights", daemon=True
        ).start()

    def outcome(self) -> dict[str, Any] | None:
        """None while under way; then {"ok", "checksum" (hex, of what arrived), "receive_seconds", "error"}."""
        return self._job.outcome if self._job is not None else None

    def take(self, version: int) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of the version that has arrived, once; its memory goes with the iterator.

        WeightSyncError when that version is not here whole."""
        job, self._job = self._job, None
        if job is None or job.manifest.version != version or not (job.outcome or {}).get("ok"):
            raise WeightSyncError(
                f"version {version} has not been received, so it cannot be applied"
            )
        for flat, bucket in zip(job.flats, job.manifest.buckets, strict=True):
            yield from unpack(flat, bucket)

    def close(self) -> None:
        """Forget everything and leave the group."""
        self._job = None
        self._channel.drop()

    def _run(self, job: _Job) -> None:
        start = time.monotonic()
        try:
            checksum = self._receive(job)
        except Exception as error:  # noqa: BLE001  the thread's end: the error is the outcome
            if "group" in job.order:
                self._channel.drop(job.order["group"]["id"])
            job.flats.clear()
            job.outcome = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        else:
            seconds = time.monotonic() - start
            job.outcome = {"ok": True, "checksum": checksum, "receive_seconds": seconds}

    def _receive(self, job: _Job) -> str:
        verifier = Verifier(job.manifest)
        for flat in self._files(job) if job.order["transport"] == "files" else self._group(job):
            verifier.add(flat)
            job.flats.append(flat)
        return verifier.checksum()

    def _group(self, job: _Job) -> Iterator[torch.Tensor]:
        group = self._channel.group(msgspec.convert(job.order["group"], GroupSpec))
        for bucket in job.manifest.buckets:
            flat = torch.empty(bucket.nbytes, dtype=torch.uint8)
            group.broadcast(flat)
            yield flat

    def _files(self, job: _Job) -> Iterator[torch.Tensor]:
        for path in job.order["files"]:
            yield torch.from_numpy(np.fromfile(Path(path), dtype=np.uint8))
