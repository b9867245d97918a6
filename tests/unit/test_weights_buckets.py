"""Buckets: what is packed is unpacked bit for bit; checksums depend on the weights and on nothing else."""

from __future__ import annotations

import msgspec
import pytest
import torch

from agl_ray.types.errors import WeightSyncError
from agl_ray.weights import buckets as bk
from agl_ray.weights.sender import WeightSender


def tensors(seed: int = 0) -> list[tuple[str, torch.Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    return [
        ("embed", torch.randn(11, 5, generator=rng)),
        ("norm", torch.randn(5, generator=rng)),
        ("head", torch.randn(11, 5, generator=rng).to(torch.bfloat16)),
        ("steps", torch.arange(3)),
        ("scale", torch.tensor(2.0)),
    ]


@pytest.mark.parametrize("bucket_bytes", [1, 100, 300, 10**6])
def test_pack_unpack_is_exact(bucket_bytes: int) -> None:
    given = tensors()
    plan = bk.plan(given, bucket_bytes)
    assert [e.name for b in plan for e in b.tensors] == [name for name, _ in given]
    assert all(b.nbytes <= bucket_bytes or len(b.tensors) == 1 for b in plan)
    assert all(e.offset % bk.ALIGN == 0 for b in plan for e in b.tensors)
    back = {n: t for b in plan for n, t in bk.unpack(bk.pack(dict(given), b), b)}
    for name, tensor in given:
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


def test_model_checksum_ignores_order_and_bucket_size() -> None:
    given = tensors()
    sums = {
        WeightSender(order, 1, size, host="127.0.0.1").manifest()["checksum"]
        for order in (given, given[::-1])
        for size in (1, 300, 10**6)
    }
    assert len(sums) == 1


@pytest.mark.parametrize("change", ["value", "name", "dtype", "shape"])
def test_model_checksum_sees_every_change(change: str) -> None:
    given = tensors()
    other = dict(given)
    if change == "value":
        other["norm"] = other["norm"].clone()
        other["norm"][3] += 1e-7
    elif change == "name":
        other["norm2"] = other.pop("norm")
    elif change == "dtype":
        other["steps"] = other["steps"].view(torch.float64)
    else:
        other["embed"] = other["embed"].view(5, 11)
    before = WeightSender(given, 1, 300, host="127.0.0.1").manifest()["checksum"]
    assert (
        WeightSender(list(other.items()), 1, 300, host="127.0.0.1").manifest()["checksum"] != before
    )


def test_verifier_accepts_the_sent_bytes_and_refuses_others() -> None:
    sender = WeightSender(tensors(), 7, 200, host="127.0.0.1")
    manifest = bk.manifest_from_dict(sender.manifest())
    assert len(manifest.buckets) > 1
    good = bk.Verifier(manifest)
    for flat in sender.buckets:
        good.add(flat)
    assert good.checksum() == manifest.checksum

    bad = bk.Verifier(manifest)
    damaged = sender.buckets[0].clone()
    damaged[0] ^= 1
    with pytest.raises(WeightSyncError, match="bucket 0 of version 7 arrived damaged"):
        bad.add(damaged)
    with pytest.raises(WeightSyncError, match=r"0 of .* buckets of version 7 arrived"):
        bad.checksum()


def test_the_sender_keeps_a_copy() -> None:
    given = tensors()
    sender = WeightSender(given, 1, 10**6, host="127.0.0.1")
    given[0][1].zero_()
    name, kept = next(iter(bk.unpack(sender.buckets[0], sender.manifest_struct.buckets[0])))
    assert name == "embed"
    assert kept.abs().sum() > 0


def test_bad_input_is_named() -> None:
    with pytest.raises(WeightSyncError, match="distinct names"):
        bk.plan([("a", torch.ones(1)), ("a", torch.ones(1))], 10)
    with pytest.raises(WeightSyncError, match="distinct names"):
        bk.plan([], 10)
    with pytest.raises(WeightSyncError, match="no weight manifest"):
        bk.manifest_from_dict({"version": 1})
    plan = bk.plan([("a", torch.ones(4))], 100)
    with pytest.raises(WeightSyncError, match="its manifest says 16"):
        list(bk.unpack(torch.zeros(8, dtype=torch.uint8), plan[0]))


def test_manifest_is_plain_data() -> None:
    manifest = WeightSender(tensors(), 3, 200, host="127.0.0.1").manifest()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(manifest)) == manifest
    assert manifest["version"] == 3
