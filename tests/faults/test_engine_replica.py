"""kill -9 of the engine replica, of its engine core, and of weight_sync under a real vLLM engine: replaced, caught up, nothing left behind.

The model's head is tied to its embedding (vLLM on CPU leaves a tied head's packed copy stale after an update unless told), and the weights
come by the object store; `tests/integration/test_engine_vllm.py` has an untied model and Gloo.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from processes import descendants, ended

from tests.integration import tiny_model
from tests.integration.test_engine_vllm import Served, assert_says

pytestmark = pytest.mark.slow

START_SECONDS = 600


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [tiny_model.make(root / str(i), seed=i, tied=True) for i in range(3)]


@pytest.fixture(scope="module")
def served(ray_cluster: None, folders: list[Path]) -> Iterator[Served]:
    from ray import serve

    serve.start(proxy_location="Disabled")
    yield Served(folders[0], "object_store")
    serve.shutdown()


def engine_cores(replica: int) -> list[psutil.Process]:
    return list(descendants(replica, "EngineCore"))


def gone(process: psutil.Process) -> bool:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if ended(process):
            return True
        time.sleep(0.05)
    return False


def replaced(served: Served, old_pid: int) -> int:
    """Wait until Serve has put another replica in the place of `old_pid`; its pid."""

    async def ask() -> int:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            try:
                stats = await asyncio.wait_for(_stats(served), timeout=START_SECONDS)
            except ray.exceptions.RayActorError:
                await asyncio.sleep(0.2)
                continue
            if stats["pid"] != old_pid:
                return int(stats["pid"])
            await asyncio.sleep(0.2)
        raise AssertionError("the replica was not replaced")

    return asyncio.run(ask())


async def _stats(served: Served) -> dict[str, int]:
    stats: dict[str, int] = await served.handle.stats.remote()
    return stats


def test_a_killed_replica_is_replaced_and_caught_up_before_it_serves(
    served: Served, folders: list[Path]
) -> None:
    served.publish(folders[1])
    old = served.stats()["pid"]
    (core,) = engine_cores(old)
    os.kill(old, signal.SIGKILL)
    assert gone(core), "the engine core outlived its replica"
    new = replaced(served, old)
    # The very first answer of the new replica: not the base model it was loaded with, but the version published before the death.
    answer = served.generate()
    assert answer.weight_versions == [(0, 1)]
    assert_says(folders[1], answer)
    assert served.stats()["pid"] == new
    (news,) = ray.get(served.sync.take_news.remote(), timeout=240)
    assert "was started in place of a lost one" in news.text
    assert news.restarted == "engine"
    result = served.publish(folders[2], lost=1)
    assert result["transport"] == "object_store"
    assert result["followers"] == 1
    assert "is replaced by Serve: it died" in result["notices"][0]
    assert_says(folders[2], served.generate())


def test_a_dead_engine_core_fails_its_calls_and_the_replica_is_replaced(served: Served) -> None:
    from agl_ray.types.errors import EngineError

    old = served.stats()["pid"]
    (core,) = engine_cores(old)
    call, _ = served.begun()
    core.kill()
    with pytest.raises(EngineError, match="failed during call"):
        call.result(timeout_s=240)
    replaced(served, old)
    assert_says(served.folder, served.generate())


def test_weight_sync_may_die(served: Served, folders: list[Path]) -> None:
    ray.kill(served.sync, no_restart=False)
    # A publish right away waits for the engine to register again rather than go to nobody.
    assert served.publish(folders[0])["followers"] == 1
    assert_says(folders[0], served.generate())
