"""Buckets: a model's tensors as a few flat runs of bytes, with the checksums that both ends compare.

Called by: `sender.py` (packs) and `vllm_plugin.py` (unpacks). Torch on CPU only; no Ray, no vLLM.
Test alone: `pytest tests/unit/test_weights_buckets.py`.

A tensor's digest is BLAKE3 over its bytes; a bucket's checksum is BLAKE3 over its digests in order; the model's checksum is BLAKE3 over
(name, dtype, shape, digest) sorted by name. The last therefore depends neither on the order of the tensors, nor on the bucket size,
nor on how many ranks the learner has: equal checksums mean equal weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
import torch

from agl_ray.types.errors import WeightSyncError

ALIGN = 64
"""Every tensor starts at a multiple of this many bytes, so that a view of any dtype on it is aligned."""


class TensorEntry(msgspec.Struct, frozen=True):
    """Where one tensor lies in its bucket."""

    name: str
    dtype: str
    """As torch names it without the prefix: `float32`, `bfloat16`."""
    shape: list[int]
    offset: int
    """First byte in the bucket."""
    nbytes: int


class Bucket(msgspec.Struct, frozen=True):
    """One transfer unit."""

    nbytes: int
    tensors: list[TensorEntry]
    checksum: str = ""
    """Hex; empty in a plan, filled once the bytes are there."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """All that a receiver must know of one weight version before its bytes arrive."""

    version: int
    checksum: str
    """Hex, of the whole model."""
    buckets: list[Bucket]
    sender: str
    """Unique to the sending process; another one means another learner incarnation."""
    host: str
    port: int
    """Where the sending process keeps the rendezvous store of the transfer groups."""
    device: str
    """`cuda` where the sender has a GPU to broadcast from, else `cpu`."""

    @property
    def nbytes(self) -> int:
        return sum(bucket.nbytes for bucket in self.buckets)


def plan(tensors: Sequence[tuple[str, torch.Tensor]], bucket_bytes: int) -> list[Bucket]:
    """Lay the tensors out in order, a new bucket whenever the next tensor would pass `bucket_bytes`.

    A tensor larger than `bucket_bytes` gets a bucket of its own. WeightSyncError when two tensors have one name or there is none."""
    names = [name for name, _ in tensors]
    if not names or len(set(names)) != len(names):
        raise WeightSyncError(
            f"expected tensors with distinct names, got {len(names)} tensors with {len(set(names))} names"
        )
    buckets: list[Bucket] = []
    entries: list[TensorEntry] = []
    end = 0
    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        offset = -(-end // ALIGN) * ALIGN
        if entries and offset + nbytes > bucket_bytes:
            buckets.append(Bucket(end, entries))
            entries, offset = [], 0
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries.append(TensorEntry(name, dtype, list(tensor.shape), offset, nbytes))
        end = offset + nbytes
    buckets.append(Bucket(end, entries))
    return buckets


def pack(tensors: dict[str, torch.Tensor], bucket: Bucket) -> torch.Tensor:
    """The bucket's bytes (uint8, CPU), copied from wherever the tensors are."""
    flat = torch.zeros(bucket.nbytes, dtype=torch.uint8)
    for entry, view in _views(flat, bucket):
        view.copy_(tensors[entry.name].detach())
    return flat


def unpack(flat: torch.Tensor, bucket: Bucket) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) in the bucket's order; the tensors are views of `flat` (uint8, CPU)."""
    for entry, view in _views(flat, bucket):
        yield entry.name, view


def _views(flat: torch.Tensor, bucket: Bucket) -> Iterator[tuple[TensorEntry, torch.Tensor]]:
    if flat.numel() != bucket.nbytes:
        raise WeightSyncError(
            f"a bucket has {flat.numel()} bytes; its manifest says {bucket.nbytes}: sender and receiver disagree"
        )
    for entry in bucket.tensors:
        part = flat[entry.offset : entry.offset + entry.nbytes]
        yield entry, part.view(getattr(torch, entry.dtype)).view(entry.shape)


def digests(flat: torch.Tensor, bucket: Bucket) -> list[bytes]:
    """The digest of each tensor of the bucket, in order."""
    from blake3 import blake3

    raw = memoryview(flat.numpy())
    return [
        blake3(raw[entry.offset : entry.offset + entry.nbytes]).digest() for entry in bucket.tensors
    ]


def bucket_checksum(tensor_digests: Iterable[bytes]) -> str:
    """Hex checksum of a bucket from its tensors' digests."""
    from blake3 import blake3

    return str(blake3(b"".join(tensor_digests)).hexdigest())


def model_checksum(entries: Iterable[tuple[TensorEntry, bytes]]) -> str:
    """Hex checksum of a whole model from (entry, digest) of all its tensors, in any order."""
    from blake3 import blake3

    total = blake3()
    for entry, digest in sorted(entries, key=lambda pair: pair[0].name):
        total.update(f"{entry.name}|{entry.dtype}|{entry.shape}|".encode() + digest)
    return str(total.hexdigest())


class Verifier:
    """Checks buckets against a manifest as they arrive, and knows the checksum of what arrived.

    One instance per received version; `add` in bucket order, then `checksum`."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._seen: list[tuple[TensorEntry, bytes]] = []
        self._next = 0

    def add(self, flat: torch.Tensor) -> None:
        """WeightSyncError when the next bucket's bytes are not those that the sender hashed."""
        bucket = self._manifest.buckets[self._next]
        found = digests(flat, bucket)
        got = bucket_checksum(found)
        if got != bucket.checksum:
            raise WeightSyncError(
                f"bucket {self._next} of version {self._manifest.version} arrived damaged: checksum {got}, expected {bucket.checksum}"
            )
        self._seen += zip(bucket.tensors, found, strict=True)
        self._next += 1

    def checksum(self) -> str:
        """The model checksum of all buckets; WeightSyncError when one is missing or the whole differs from the manifest."""
        if self._next != len(self._manifest.buckets):
            raise WeightSyncError(
                f"{self._next} of {len(self._manifest.buckets)} buckets of version {self._manifest.version} arrived"
            )
        got = model_checksum(self._seen)
        if got != self._manifest.checksum:
            raise WeightSyncError(
                f"version {self._manifest.version} arrived with checksum {got}, expected {self._manifest.checksum}"
            )
        return got


def manifest_from_dict(data: dict[str, Any]) -> Manifest:
    """A Manifest from its plain form (`msgspec.to_builtins`); WeightSyncError when it is not one."""
    try:
        return msgspec.convert(data, Manifest)
    except msgspec.ValidationError as error:
        raise WeightSyncError(f"this is no weight manifest: {error}") from error
