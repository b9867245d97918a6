"""Runner pools that grow and shrink, and what is said of runners that cannot start; a runner that leaves finishes what it has."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors import runner as runner_module
from actors.runner import Runner
from actors.runner_pool import RunnerPool
from actors.runner_pools import RunnerPools
from actors.store import create_store
from agl_ray.config import RunConfig
from agl_ray.config.tracing import TracingConfig
from agl_ray.store import LightningStore
from agl_ray.store.core import StoreCore
from agl_ray.types import EndReason, EnqueueRolloutRequest, RunError, new_id

AGENTS = Path(__file__).parent / "agents_for_tests.py"


def test_a_runner_that_leaves_finishes_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "LEASE_POLL", 0.2)

    async def main() -> None:
        core = await StoreCore.open("memory://")
        store = LightningStore.local(core)
        runner = Runner(
            "runner",
            store,
            f"{AGENTS}:slow_echo",
            base=str(AGENTS.parent),
            concurrency=2,
            timeout_seconds=60,
            lease_seconds=60,
            tracing=TracingConfig(),
            otlp=False,
        )
        await store.add_resources({})
        first = await store.enqueue_rollout({"reward": 1.0, "seconds": 0.6})
        running = asyncio.create_task(runner.run())
        await asyncio.wait_for(runner._working.wait(), 240)
        idle = asyncio.create_task(runner.idle(0.1))
        await runner.drain()
        while (await store.statistics())["waiting_takers"]:  # noqa: ASYNC110  a lease on its way
            await asyncio.sleep(0.02)
        second = await store.enqueue_rollout({"reward": 1.0})
        assert not idle.done() or runner._finished
        assert await asyncio.wait_for(running, 60) == 1
        await asyncio.wait_for(idle, 60)
        attempts = await store.get_attempts([first.rollout_id, second.rollout_id])
        assert [one.end_reason for one in attempts] == [EndReason.OK]  # none of the second
        await core.close()

    asyncio.run(main())


def config(**runners: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": "unused"},
            "data": {"train": "unused", "val": "unused"},
            "runners": {"concurrency": 2, "lease_seconds": 60, **runners},
        }
    )


@pytest.fixture
def store(ray_cluster: None, tmp_path: Path) -> Iterator[LightningStore]:
    import ray

    namespace = new_id("test")
    store = create_store("store", namespace, f"sqlite:///{tmp_path / 'store.db'}")
    yield store
    ray.kill(ray.get_actor("store", namespace=namespace), no_restart=True)


def pool_of(settings: RunConfig, store: LightningStore, said: list[str]) -> RunnerPool:
    return RunnerPool(
        settings,
        store,
        f"{AGENTS}:slow_echo",
        base=str(AGENTS.parent),
        namespace=new_id("pool"),
        notice=said.append,
        remark=said.append,
    )


@pytest.mark.slow
def test_a_pool_grows_while_work_waits_and_shrinks_without_it(store: LightningStore) -> None:
    async def main() -> None:
        said: list[str] = []
        pool = pool_of(config(min_runners=0, max_runners=3, idle_seconds=0.5), store, said)
        supervision = asyncio.ensure_future(pool.supervise())
        await store.add_resources({})
        try:
            wanted = [EnqueueRolloutRequest(input={"reward": 1.0, "seconds": 0.5})] * 12
            rollouts = [  # more than three runners take at once
                one.rollout_id for one in await store.enqueue_many_rollouts(wanted)
            ]
            await asyncio.wait_for(pool._until(lambda: pool.num_runners > 0), 240)
            assert pool.num_runners == 3
            done = await store.wait_for_rollouts(rollout_ids=rollouts, timeout=240)
            assert len(done) == 12
            await asyncio.wait_for(pool._until(lambda: pool.num_runners == 0), 240)
        finally:
            await pool.stop()
            await supervision
        assert not [one for one in said if "died" in one or "without" in one]
        statistics = await store.statistics()
        assert statistics["attempts_by_reason"]["ok"] == 12
        assert statistics["attempts"] == 12  # none was cut and tried again

    asyncio.run(main())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runners", "texts"),
    [
        (
            {"resources": {"sandbox": 1.0}, "start_seconds": 1.0},
            ("0.1 CPU, 1 sandbox; no node of the cluster has that, together they have 4 CPU",),
        ),
        (
            {"runtime_env": {"working_dir": "https://127.0.0.1:9/agent.zip"}},
            # The last of Ray's many lines, too.
            ("runners.runtime_env", "Max retries exceeded", "Connection refused"),
        ),
        (
            {"runtime_env": {"image_uri": "127.0.0.1:9/agents:1"}},
            # Ray pulls it with podman: said whether podman is not there, or does not find the image.
            ("runners.runtime_env", "podman"),
        ),
    ],
)
def test_a_pool_that_cannot_start_says_why(
    store: LightningStore, runners: dict[str, Any], texts: tuple[str, ...]
) -> None:
    async def main() -> None:
        pool = pool_of(config(**runners), store, [])
        with pytest.raises(RunError) as found:
            await asyncio.wait_for(pool.supervise(), 240)
        await pool.stop()
        for text in ("runner pool", *texts):
            assert text in str(found.value)

    asyncio.run(main())


@pytest.mark.slow
def test_a_larger_pool_that_finds_no_place_goes_on_without(store: LightningStore) -> None:
    async def main() -> None:
        said: list[str] = []
        settings = config(min_runners=1, max_runners=2, num_cpus=3.0, concurrency=1)
        pool = pool_of(settings, store, said)
        supervision = asyncio.ensure_future(pool.supervise())
        await store.add_resources({})
        try:
            await asyncio.wait_for(pool._until(lambda: bool(pool._handles)), 240)
            await asyncio.wait_for(pool._until(lambda: not pool._starting), 240)
            pool.runners = settings.runners.model_copy(update={"start_seconds": 2.0})
            for _ in range(8):
                await store.enqueue_rollout({"reward": 1.0, "seconds": 1.0})
            await asyncio.wait_for(pool._until(lambda: pool.num_runners == 2), 240)
            await asyncio.wait_for(pool._until(lambda: pool.num_runners == 1), 240)
        finally:
            await pool.stop()
            await supervision
        assert said
        assert "others hold its place; free in the cluster: 1 CPU" in said[-1]
        assert said[-1].endswith("the run goes on without it")

    asyncio.run(main())


async def workers_of(
    settings: RunConfig, store: LightningStore, said: list[str], rollouts: int = 12
) -> set[str]:
    """The pools whose runners had a share of so many rollouts, two at once in each runner; the others stay away."""
    pools = RunnerPools(
        settings,
        store,
        f"{AGENTS}:slow_echo",
        base=str(AGENTS.parent),
        namespace=new_id("pool"),
        notice=said.append,
        remark=said.append,
    )
    supervision = asyncio.ensure_future(pools.supervise())
    await store.add_resources({})
    try:
        ids = [
            (await store.enqueue_rollout({"reward": 1.0, "seconds": 1.0})).rollout_id
            for _ in range(rollouts)
        ]
        assert len(await store.wait_for_rollouts(rollout_ids=ids, timeout=240)) == rollouts
    finally:
        await pools.stop()
        await supervision
    attempts = await store.get_attempts(ids)
    assert {one.end_reason for one in attempts} == {EndReason.OK}
    return {str(one.worker_id).split("-")[0] for one in attempts}


@pytest.mark.slow
def test_pools_share_the_queue_and_grow_in_their_order(store: LightningStore) -> None:
    first, further = {"min_runners": 0, "max_runners": 1}, {"min_runners": 0, "max_runners": 2}
    settings = config(**first, pools={"spot": {**further, "concurrency": 2}})
    said: list[str] = []
    # Half a minute of work for the first pool alone: the second must have come before.
    assert asyncio.run(workers_of(settings, store, said, 60)) == {"runner", "spot"}
    assert not [one for one in said if "died" in one]
    enough = config(min_runners=0, max_runners=6, pools={"spot": {**further, "concurrency": 2}})
    assert asyncio.run(workers_of(enough, store, said)) == {"runner"}


@pytest.mark.slow
def test_a_pool_without_a_place_leaves_the_work_to_the_next(store: LightningStore) -> None:
    nowhere = {"min_runners": 0, "max_runners": 1, "resources": {"sandbox": 1.0}}
    spot = {"min_runners": 0, "max_runners": 1, "concurrency": 2}
    said: list[str] = []
    settings = config(**nowhere, start_seconds=1.0, pools={"spot": spot})
    assert asyncio.run(workers_of(settings, store, said)) == {"spot"}
    assert "no node of the cluster has that" in said[0]


@pytest.mark.slow
def test_a_further_pool_that_cannot_start_ends_the_run_and_says_which(
    store: LightningStore,
) -> None:
    lonely = {"resources": {"sandbox": 1.0}, "start_seconds": 1.0}
    with pytest.raises(RunError, match=r"runners\.pools\.spot\.start_seconds \(1 s\)"):
        asyncio.run(workers_of(config(pools={"spot": lonely}), store, []))
