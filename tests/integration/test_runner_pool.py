"""Runners as real Ray actors over the real store: groups end, a killed runner loses nothing, bad agents are named."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors import runner_watch
from actors.rollout_groups import GroupRollouts
from actors.runner_pools import RunnerPools
from actors.store import create_store
from agl_ray.config import RunConfig
from agl_ray.schedule import RowPositions
from agl_ray.store import LightningStore
from agl_ray.types import LLM, AgentFailure, EndReason, RunError, new_id

pytestmark = pytest.mark.slow

AGENTS = Path(__file__).parent / "agents_for_tests.py"
BAD_AGENTS = str(Path(__file__).parent.parent / "unit" / "bad_agents.py") + ":misbehaves"


def config(**rollout: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": "unused"},
            "data": {"train": "unused", "val": "unused", "shuffle": False},
            "rollout": {"groups_per_step": 2, "group_size": 4, "timeout_seconds": 60, **rollout},
            "runners": {"num_runners": 2, "concurrency": 4, "lease_seconds": 60},
        }
    )


@pytest.fixture
def store(ray_cluster: None, tmp_path: Path) -> Iterator[LightningStore]:
    import ray

    namespace = new_id("test")
    store = create_store("store", namespace, f"sqlite:///{tmp_path / 'store.db'}")
    yield store
    ray.kill(ray.get_actor("store", namespace=namespace), no_restart=True)


async def with_pool(
    settings: RunConfig, store: LightningStore, agent: str, rows: list[Any], work: Any
) -> tuple[Any, list[str]]:
    """The result of `work(groups)` while a pool of runners of `agent` is at work, and the pool's notices."""
    notices: list[str] = []
    resources = await store.add_resources(
        {"main_llm": LLM(endpoint="http://127.0.0.1:9", model="m")}
    )
    pool = RunnerPools(
        settings,
        store,
        agent if ":" in agent else f"{AGENTS}:{agent}",
        base=str(AGENTS.parent),
        namespace=new_id("pool"),
        notice=notices.append,
    )
    supervision = asyncio.ensure_future(pool.supervise())
    groups = GroupRollouts(settings, store, rows, resources.resources_id, positions=RowPositions())
    try:
        return await asyncio.wait_for(work(groups), 300), notices
    finally:
        await pool.stop()
        await supervision


def test_a_group_is_a_rows_rollouts_with_their_rewards(store: LightningStore) -> None:
    rows = [{"reward": 0.25}, {"reward": 0.75}]

    async def scenario() -> None:
        settings = config()
        plan, _ = await with_pool(
            settings, store, "slow_echo", rows, lambda groups: groups.group(1, lambda n: None)
        )
        assert [member.reward for member in plan.members] == [0.25] * 4
        attempts = await store.get_attempts([m.rollout_id for m in plan.members])
        assert all(attempt.end_reason is EndReason.OK for attempt in attempts)
        spans = await store.read_spans([(m.rollout_id, m.attempt_id) for m in plan.members])
        assert spans["reward"].to_pylist() == [0.25] * 4

    asyncio.run(scenario())


def test_a_killed_runner_is_replaced_and_its_attempts_are_queued_again(
    store: LightningStore,
) -> None:
    rows = [{"reward": 1.0, "die": i == 3} for i in range(8)]

    async def scenario() -> None:
        evaluation, notices = await with_pool(
            config(max_attempts=1),
            store,
            "dies_once",
            rows,
            lambda groups: groups.evaluate(rows, 0, lambda n: None),
        )
        assert evaluation.scores == [1.0] * 8
        assert evaluation.failures == {}
        assert len(notices) == 1
        assert "queued again" in notices[0]
        statistics = await store.statistics()
        assert statistics["attempts_by_reason"]["ok"] == 8
        assert statistics["attempts_by_reason"]["lost"] >= 1
        for one in (await store.query_rollouts()).items:  # what was lost was queued again once
            tries = (await store.query_attempts(one.rollout_id)).items
            reasons = [attempt.end_reason for attempt in tries]
            assert reasons in ([EndReason.OK], [EndReason.LOST, EndReason.OK])

    asyncio.run(scenario())


def test_a_runner_whose_loop_stands_still_is_replaced_and_a_slow_one_is_not(
    store: LightningStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_watch, "LEASES", 2.0)
    monkeypatch.setattr(runner_watch, "LEAST", 1.0)
    settings = config(max_attempts=20, timeout_seconds=3600)  # its leases are short
    one = {"num_runners": 1, "concurrency": 1, "lease_seconds": 2.0}
    settings = settings.model_copy(update={"runners": settings.runners.model_copy(update=one)})

    async def scenario(blocks: float) -> list[str]:
        rows = [{"blocks": blocks}]
        evaluation, notices = await with_pool(
            settings, store, "blocks_once", rows, lambda groups: groups.evaluate(rows, 0, print)
        )
        assert evaluation.scores == [1.0]
        return notices

    assert asyncio.run(scenario(3.0)) == []
    (notice,) = asyncio.run(scenario(3600.0))
    assert "its event loop had stood still for 6 s" in notice
    assert "a new runner starts" in notice
    assert "runners.isolation: thread" in notice


@pytest.mark.parametrize(
    ("agent", "text"),
    [("raises", "no such tool: search"), ("not_a_number", "expected a finite number")],
)
def test_an_agent_that_always_fails_stops_the_run_before_it_begins(
    store: LightningStore, agent: str, text: str
) -> None:
    async def scenario() -> None:
        with pytest.raises(AgentFailure, match=text):
            await with_pool(
                config(), store, agent, [{"reward": 1.0}] * 2, lambda groups: groups.preflight()
            )

    asyncio.run(scenario())


def test_groups_that_keep_failing_end_the_run_with_their_reason(store: LightningStore) -> None:
    async def scenario() -> None:
        with pytest.raises(RunError, match="agent_error"):
            await with_pool(
                config(),
                store,
                "raises",
                [{"reward": 1.0}],
                lambda groups: groups.group(1, lambda n: None),
            )

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("isolation", "only_here", "failures"),
    [
        ("inline", (), {"agent_error": 2, "timeout": 1}),
        ("process", ("os_exit", "crash"), {"agent_error": 4, "timeout": 1}),
    ],
)
def test_whatever_agents_do_the_pool_goes_on(
    store: LightningStore, isolation: str, only_here: tuple[str, ...], failures: dict[str, int]
) -> None:
    """Each ends its own attempt only, with its reason counted: no runner dies, and the other rollouts go on. A process of their own keeps
    also those apart that would take the runner with them."""
    fine = ("fork", "threads", "print", "nothing", "nothing")
    kinds = ("raise", "exit", "hang", *only_here, *fine)
    rows = [{"do": do, "seconds": 15, "bytes": 1 << 23} for do in kinds]

    async def scenario() -> None:
        # One deadline for those that hang and those that must end: a machine may stand still for seconds.
        settings = config(max_attempts=1, timeout_seconds=10.0)
        runners = settings.runners.model_copy(update={"isolation": isolation})
        evaluation, notices = await with_pool(
            settings.model_copy(update={"runners": runners}),
            store,
            BAD_AGENTS,
            rows,
            lambda groups: groups.evaluate(rows, 0, lambda n: None),
        )
        assert evaluation.scores == [1.0] * len(fine)
        assert evaluation.failures == failures
        assert notices == []

    asyncio.run(scenario())
