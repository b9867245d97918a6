"""Transfer groups in one process: sender and receivers in threads over real sockets; peers that never come, die, or are superseded."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from agl_ray.types.errors import WeightSyncError
from agl_ray.weights import sender as sender_module
from agl_ray.weights.receiver import Receiver
from agl_ray.weights.sender import WeightSender
from agl_ray.weights.transports import Channel, GroupSpec

HOST = "127.0.0.1"


def make(version: int, size: int = 1000) -> WeightSender:
    rng = torch.Generator().manual_seed(version)
    tensors = [(f"layer.{i}", torch.randn(size + i, generator=rng)) for i in range(4)]
    return WeightSender(tensors, version, 2 * 4 * size, host=HOST)


def order(
    sender: WeightSender, group: str, rank: int, world: int, seconds: float = 20
) -> dict[str, Any]:
    manifest = sender.manifest()
    spec = {
        "id": group,
        "backend": "gloo",
        "host": manifest["host"],
        "port": manifest["port"],
        "rank": rank,
        "world": world,
        "seconds": seconds,
        "join_seconds": seconds,
    }
    return {
        "version": sender.version,
        "transport": "gloo",
        "group": spec,
        "manifest": manifest,
    }


def outcome(receiver: Receiver) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while (found := receiver.outcome()) is None:
        assert time.monotonic() < deadline, "the receiver never ended"
        time.sleep(0.01)
    return found


def test_two_receivers_get_two_versions_over_one_group() -> None:
    receivers = [Receiver(), Receiver()]
    for version in (1, 2):
        sender = make(version)
        for rank, receiver in enumerate(receivers, start=1):
            receiver.begin(order(sender, "same", rank, 3))
        sender.send(order(sender, "same", 0, 3))
        for receiver in receivers:
            found = outcome(receiver)
            assert found["ok"], found
            assert found["checksum"] == sender.manifest()["checksum"]
            got = dict(receiver.take(version))
            want = dict(zip([f"layer.{i}" for i in range(4)], range(4), strict=True))
            assert set(got) == set(want)
            assert torch.equal(
                got["layer.3"],
                torch.frombuffer(sender.buckets[-1].numpy(), dtype=torch.float32)[-1003:],
            )
    for receiver in receivers:
        receiver.close()


def test_what_has_not_arrived_cannot_be_taken() -> None:
    receiver = Receiver()
    with pytest.raises(WeightSyncError, match="version 3 has not been received"):
        list(receiver.take(3))


def test_a_peer_that_never_comes_is_named() -> None:
    sender = make(1)
    with pytest.raises(
        WeightSyncError, match=r"ranks 1 of 2 did not join transfer group alone within 0\.3 s"
    ):
        sender.send(order(sender, "alone", 0, 2, seconds=0.3))


def test_a_sender_that_is_gone_is_noticed_at_once() -> None:
    sender = make(1)
    gone = order(sender, "gone", 1, 2, seconds=60)
    with socket.socket() as free:
        free.bind((HOST, 0))
        gone["group"]["port"] = free.getsockname()[1]
    receiver = Receiver()
    receiver.begin(gone)
    found = outcome(receiver)
    assert not found["ok"]
    assert "joining transfer group gone at 127.0.0.1" in found["error"]


def test_a_newer_order_supersedes_one_that_is_still_joining() -> None:
    sender = make(1)
    failed: list[Exception] = []

    def stuck() -> None:
        try:
            sender.send(order(sender, "stuck", 0, 3))
        except WeightSyncError as error:
            failed.append(error)

    channel = sender_module._channel
    before = channel._interrupt
    thread = threading.Thread(target=stuck)
    thread.start()
    receiver = Receiver()
    receiver.begin(order(sender, "stuck", 1, 3))  # rank 2 never comes
    deadline = time.monotonic() + 30
    while channel._interrupt is before:  # the sender is on its way into the old group
        assert time.monotonic() < deadline
        time.sleep(0.01)
    receiver.begin(order(sender, "fresh", 1, 2))
    sender.send(order(sender, "fresh", 0, 2))
    assert outcome(receiver)["ok"]
    thread.join(timeout=30)
    assert len(failed) == 1
    receiver.close()


def test_a_receiver_that_leaves_breaks_the_broadcast_and_the_group_is_rebuilt() -> None:
    sender = make(1, size=300_000)
    first = Receiver()
    first.begin(order(sender, "before", 1, 2))
    sender.send(order(sender, "before", 0, 2))
    assert outcome(first)["ok"]
    first.close()

    def send_thrice() -> None:  # the first one may still fit into the socket's buffer
        for _ in range(3):
            sender.send(order(sender, "before", 0, 2, seconds=5))

    with pytest.raises(WeightSyncError):
        send_thrice()
    second = Receiver()
    second.begin(order(sender, "after", 1, 2))
    sender.send(order(sender, "after", 0, 2))
    assert outcome(second)["ok"]
    second.close()


def test_files_are_received_and_checked(tmp_path: Path) -> None:
    sender = make(4)
    paths = []
    for i, flat in enumerate(sender.buckets):
        paths.append(str(tmp_path / f"{i}"))
        flat.numpy().tofile(paths[-1])
    receiver = Receiver()
    receiver.begin({"manifest": sender.manifest(), "transport": "files", "files": paths})
    assert outcome(receiver)["checksum"] == sender.manifest()["checksum"]

    damaged = bytearray(Path(paths[0]).read_bytes())
    damaged[5] ^= 1
    Path(paths[0]).write_bytes(damaged)
    receiver.begin({"manifest": sender.manifest(), "transport": "files", "files": paths})
    found = outcome(receiver)
    assert not found["ok"]
    assert "arrived damaged" in found["error"]


def test_an_order_for_another_version_is_refused() -> None:
    sender = make(4)
    with pytest.raises(WeightSyncError, match="asked to send version 5, but version 4 is staged"):
        sender.send({"version": 5, "transport": "gloo"})


def test_dropping_a_channel_twice_is_harmless() -> None:
    channel = Channel()
    channel.drop()
    channel.drop()


def test_group_spec_is_strict() -> None:
    import msgspec

    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"id": "x", "backend": "mpi"}, GroupSpec)
