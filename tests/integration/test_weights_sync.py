"""weight_sync with real actors, real transfer groups and no vLLM: order, lateness, death, fallback, restart."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.weight_sync import SenderLost, create_weight_sync
from agl_ray.config.models import RunConfig
from tests.integration.weight_peers import PlainEngine, Sender

pytestmark = pytest.mark.slow

_names = itertools.count()


class Peers:
    """One weight_sync with its learner and engines in a namespace of their own."""

    def __init__(self, transport: str = "auto", seconds: float = 30.0) -> None:
        self.namespace = f"weights-{next(_names)}"
        config = RunConfig.model_validate(
            {
                "model": {"path": "unused"},
                "data": {"train": "unused", "val": "unused"},
                "weights": {"transport": transport, "timeout_seconds": seconds},
            }
        )
        self.sync = create_weight_sync(config, self.namespace)
        self.engines: list[Any] = []
        self.learner: Any = None
        self.new_learner()

    def new_learner(self) -> None:
        self.learner = Sender.remote(bucket_bytes=50_000)
        ray.get(self.sync.set_learner.remote(self.learner), timeout=180)

    def engine(self, name: str = "") -> Any:
        made = PlainEngine.remote(self.namespace, name or f"replica-{len(self.engines)}")
        self.engines.append(made)
        return made

    def publish(self, version: int) -> dict[str, Any]:
        manifest = ray.get(self.learner.stage.remote(version), timeout=180)
        result: dict[str, Any] = ray.get(self.sync.publish.remote(manifest), timeout=180)
        assert result["checksum"] == manifest["checksum"]
        return result

    def kill(self, actor: Any) -> None:
        os.kill(ray.get(actor.state.remote(), timeout=120)["pid"], signal.SIGKILL)

    def close(self) -> None:
        for actor in [*self.engines, self.learner, self.sync]:
            ray.kill(actor)


@pytest.fixture
def peers(ray_cluster: None) -> Iterator[Callable[..., Peers]]:
    made: list[Peers] = []

    def make(**options: Any) -> Peers:
        made.append(Peers(**options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_engines_take_the_first_version_and_follow(peers: Callable[..., Peers]) -> None:
    p = peers()
    starts = [p.engine().start.remote(60) for _ in range(2)]
    first = p.publish(0)
    got = ray.get(starts, timeout=180)
    assert got == [[(0, first["checksum"])]] * 2
    second = p.publish(1)
    assert second["followers"] == 2
    assert second["transport"] == "gloo"
    assert second["lost"] == []
    assert second["notices"] == []
    assert second["pause_seconds"] == pytest.approx(0.01)
    for engine in p.engines:
        assert ray.get(engine.state.remote())["applied"][-1] == (1, second["checksum"])
    assert second["checksum"] != first["checksum"]
    # Configured for one replica, so whichever came second counts as a replacement; told once.
    assert len(ray.get(p.sync.take_news.remote())) == 1
    assert ray.get(p.sync.take_news.remote()) == []


def test_publishing_without_engines_returns_and_a_late_engine_is_caught_up(
    peers: Callable[..., Peers],
) -> None:
    p = peers()
    result = p.publish(5)
    assert (result["followers"], result["transport"]) == (0, "none")
    assert ray.get(p.engine().start.remote(60), timeout=180) == [(5, result["checksum"])]
    assert p.publish(6)["followers"] == 1


def test_without_a_version_an_engine_gives_up_at_its_deadline(peers: Callable[..., Peers]) -> None:
    p = peers()
    with pytest.raises(TimeoutError, match="first weights of engine replica replica-0"):
        ray.get(p.engine().start.remote(0.5), timeout=180)


def test_a_dead_engine_is_left_behind_and_named(peers: Callable[..., Peers]) -> None:
    p = peers()
    starts = [p.engine().start.remote(60) for _ in range(2)]
    p.publish(0)
    ray.get(starts, timeout=180)
    p.publish(1)
    p.kill(p.engines[0])
    result = p.publish(2)
    assert result["lost"] == ["replica-0"]
    assert result["followers"] == 1
    assert any("replica-0 is replaced by Serve: it died" in text for text in result["notices"])
    assert ray.get(p.engines[1].state.remote())["applied"][-1][0] == 2


def test_a_broken_collective_falls_back_to_the_object_store(peers: Callable[..., Peers]) -> None:
    p = peers()
    engine = p.engine()
    start = engine.start.remote(60)
    p.publish(0)
    ray.get(start, timeout=180)
    ray.get(engine.set.remote(break_receive=True))
    result = p.publish(1)
    assert result["transport"] == "object_store"
    assert result["lost"] == []
    assert ray.get(engine.state.remote())["applied"][-1] == (1, result["checksum"])
    assert len(result["notices"]) == 2
    assert list(Path("/dev/shm").glob("agl-weights-*")) == []


def test_object_store_transport_gives_the_same_checksum(peers: Callable[..., Peers]) -> None:
    p, q = peers(transport="object_store"), peers(transport="gloo")
    sums = []
    for each in (p, q):
        start = each.engine().start.remote(60)
        each.publish(3)
        ((_, checksum),) = ray.get(start, timeout=180)
        sums.append(checksum)
    assert sums[0] == sums[1]


def test_an_engine_that_cannot_apply_leaves(peers: Callable[..., Peers]) -> None:
    p = peers()
    starts = [p.engine().start.remote(60) for _ in range(2)]
    p.publish(0)
    ray.get(starts, timeout=180)
    ray.get(p.engines[0].set.remote(break_apply=True))
    result = p.publish(1)
    assert result["lost"] == ["replica-0"]
    assert result["followers"] == 1
    assert "applying version 1 failed" in ray.get(p.engines[0].state.remote())["failure"]
    assert p.publish(2)["lost"] == []


def test_a_dead_learner_is_told_apart_and_a_new_one_goes_on(peers: Callable[..., Peers]) -> None:
    p = peers()
    engine = p.engine()
    start = engine.start.remote(60)
    p.publish(0)
    ray.get(start, timeout=180)
    manifest = ray.get(p.learner.stage.remote(1), timeout=180)
    os.kill(ray.get(p.learner.pid.remote()), signal.SIGKILL)
    with pytest.raises(SenderLost, match="the learner died while sending version 1"):
        ray.get(p.sync.publish.remote(manifest), timeout=180)
    p.new_learner()
    result = p.publish(1)
    assert result["followers"] == 1
    assert ray.get(engine.state.remote())["applied"][-1] == (1, result["checksum"])


def test_weight_sync_dies_and_everybody_finds_it_again(peers: Callable[..., Peers]) -> None:
    p = peers()
    engine = p.engine()
    start = engine.start.remote(60)
    first = p.publish(0)
    ray.get(start, timeout=180)
    ray.kill(p.sync, no_restart=False)
    # Nothing but the engine's memory tells the new weight_sync what is current and who can send it.
    late = ray.get(p.engine().start.remote(60), timeout=180)
    assert late == [(0, first["checksum"])]
    result = p.publish(1)
    assert result["followers"] == 2


def test_publishing_again_sends_nothing_twice(peers: Callable[..., Peers]) -> None:
    p = peers()
    engine = p.engine()
    start = engine.start.remote(60)
    p.publish(0)
    ray.get(start, timeout=180)
    again = p.publish(0)
    assert (again["followers"], again["transport"]) == (1, "none")
    assert len(ray.get(engine.state.remote())["applied"]) == 1
