"""WeightSender: one weight version, staged on the CPU of learner rank 0, ready to be sent any number of times.

Called by: learner rank 0 (`stage_weights` makes one, `send_weights` calls `send` with an order of the weight_sync actor).
The staged copy outlives the optimiser's next step, so that an engine that starts late can still be brought to this version.
Test alone: `pytest tests/unit/test_weights_transports.py`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from agl_ray.types.errors import WeightSyncError
from agl_ray.weights.buckets import (
    Bucket,
    Manifest,
    TensorEntry,
    bucket_checksum,
    digests,
    model_checksum,
    pack,
    plan,
)
from agl_ray.weights.transports import Channel, GroupSpec, rendezvous

# One per process and not per version: the group is kept while its members stay the same.
_channel = Channel()


class WeightSender:
    """`tensors`: (name as in the Hugging Face checkpoint, tensor on any device), whole, not sharded. They are copied: the caller may
    change them afterwards. `version`: what the engines will label tokens with. `bucket_bytes`: size of one transfer.
    `host`: address under which the engines reach this process; None = the node's address as Ray knows it."""

    def __init__(
        self,
        tensors: Sequence[tuple[str, torch.Tensor]],
        version: int,
        bucket_bytes: int,
        *,
        host: str | None = None,
    ) -> None:
        self.version = version
        by_name = dict(tensors)
        self.buckets: list[torch.Tensor] = []
        described: list[Bucket] = []
        seen: list[tuple[TensorEntry, bytes]] = []
        for bucket in plan(tensors, bucket_bytes):
            flat = pack(by_name, bucket)
            found = digests(flat, bucket)
            seen += zip(bucket.tensors, found, strict=True)
            described.append(msgspec.structs.replace(bucket, checksum=bucket_checksum(found)))
            self.buckets.append(flat)
        meeting = rendezvous()
        self.manifest_struct = Manifest(
            version=version,
            checksum=model_checksum(seen),
            buckets=described,
            sender=meeting.sender,
            host=host or _node_address(),
            port=meeting.port,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
        self._refs: list[Any] | None = None

    def manifest(self) -> dict[str, Any]:
        """What `WeightSync.publish` takes: plain data, a few hundred bytes per tensor."""
        plain: dict[str, Any] = msgspec.to_builtins(self.manifest_struct)
        return plain

    def send(self, order: dict[str, Any]) -> dict[str, Any]:
        """Carry out one order of the weight_sync actor; blocks until the bytes have left.

        Returns {"version", "transport", "seconds"} and, for the object store, "refs" (one per bucket; they live as long as this
        sender). WeightSyncError when the order is for another version, or the group does not form or breaks."""
        if order["version"] != self.version:
            raise WeightSyncError(
                f"asked to send version {order['version']}, but version {self.version} is staged; publish the staged one"
            )
        start = time.monotonic()
        answer: dict[str, Any] = {"version": self.version, "transport": order["transport"]}
        if order["transport"] == "object_store":
            _channel.drop()  # an earlier order may still be joining a group that will never be whole
            answer["refs"] = self._put()
        else:
            self._broadcast(msgspec.convert(order["group"] | {"rank": 0}, GroupSpec))
        return answer | {"seconds": time.monotonic() - start}

    def _broadcast(self, spec: GroupSpec) -> None:
        try:
            group = _channel.group(spec)
            for flat in self.buckets:
                group.broadcast(flat)
        except WeightSyncError:
            _channel.drop(spec.id)
            raise

    def _put(self) -> list[Any]:
        import ray

        if self._refs is None:
            self._refs = [ray.put(flat.numpy()) for flat in self.buckets]
        return self._refs


def _node_address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())
