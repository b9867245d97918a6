"""A runner over a real store, with agents that misbehave: each attempt ends with its reason, and the runner goes on."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import bad_agents
import pytest

from actors.runner import Runner
from agl_ray.agents import Hook, Host
from agl_ray.agents.calling import left_threads
from agl_ray.config.tracing import TracingConfig
from agl_ray.store import LightningStore, StoreCore
from agl_ray.types import Attempt, EnqueueRolloutRequest, RolloutConfig

HERE = Path(__file__).parent
ALL = ("inline", "thread", "process")
EVERYWHERE = {
    "nothing": ("ok", 1.0, ""),
    "run": ("ok", 1.0, ""),
    "raise": ("agent_error", None, "no such tool"),
    "exit": ("agent_error", None, "sys.exit(3)"),
    "threads": ("ok", 1.0, ""),
    "print": ("ok", 1.0, ""),
}


async def attempts_of(
    tasks: list[Any],
    isolation: str,
    *,
    agent: Any = "bad_agents.py:misbehaves",
    timeout: float = 60.0,
    hooks: tuple[Hook, ...] = (),
    folder: Path = Path(),
) -> tuple[list[Attempt], list[list[dict[str, Any]]]]:
    """The attempts of `tasks` under a runner, in order, and their spans."""
    core = await StoreCore.open("memory://")
    store = LightningStore.local(core)
    runner = Runner(
        "runner-1",
        store,
        agent,
        base=str(HERE),
        concurrency=4,
        timeout_seconds=timeout,
        lease_seconds=10.0,
        tracing=TracingConfig(instrument="off"),
        otlp=False,
        isolation=isolation,
        hooks=hooks,
        host=Host(artifacts_folder=str(folder)),
    )
    working = asyncio.ensure_future(runner.run())
    # A short deadline is for what overruns it; what must end well has time on a slow machine too.
    limits = [timeout if task.get("do") in ("hang", "ignore") else 60.0 for task in tasks]
    requests = [
        EnqueueRolloutRequest(input=task, mode="train", config=RolloutConfig(timeout_seconds=limit))
        for task, limit in zip(tasks, limits, strict=True)
    ]
    rollouts = await store.enqueue_many_rollouts(requests)
    ids = [rollout.rollout_id for rollout in rollouts]
    assert len(await store.wait_for_rollouts(rollout_ids=ids, timeout=120)) == len(ids)
    attempts = {one.rollout_id: one for one in await store.get_attempts(ids)}
    found = [attempts[one] for one in ids]
    spans = [await store.query_span_rows(one.rollout_id, one.attempt_id) for one in found]
    await runner.stop()
    assert await working == len(tasks)
    await core.close()
    return found, spans


@pytest.mark.parametrize("agent", ["misbehaves", "misbehaves_async"])
@pytest.mark.parametrize("isolation", ALL)
def test_every_end_has_its_reason_and_the_runner_goes_on(isolation: str, agent: str) -> None:
    kinds = [kind for kind in EVERYWHERE if kind != "run" or agent == "misbehaves"]
    tasks = [{"do": kind, "bytes": 4096, "seconds": 0.1} for kind in kinds] * 2
    attempts, _ = asyncio.run(attempts_of(tasks, isolation, agent=f"bad_agents.py:{agent}"))
    for task, attempt in zip(tasks, attempts, strict=True):
        reason, reward, text = EVERYWHERE[task["do"]]
        assert (attempt.end_reason, attempt.reward) == (reason, reward)
        assert text in (attempt.error or "")


@pytest.mark.parametrize("isolation", ALL)
def test_an_exit_in_a_task_of_the_agents_is_its_error_and_the_runner_goes_on(
    isolation: str,
) -> None:
    tasks = [{"do": "exit_in_gather"}, {"do": "exit_in_task"}, {"do": "nothing"}]
    agent = "bad_agents.py:misbehaves_async"
    attempts, _ = asyncio.run(attempts_of(tasks, isolation, agent=agent))
    assert [one.end_reason for one in attempts] == ["agent_error", "agent_error", "ok"]
    assert all("sys.exit(3)" in (one.error or "") for one in attempts[:2])


@pytest.mark.parametrize("isolation", ALL)
@pytest.mark.parametrize("agent", ["misbehaves", "misbehaves_async"])
def test_a_deadline_ends_the_attempt_and_what_hangs_blocks_nobody(
    isolation: str, agent: str, tmp_path: Path
) -> None:
    tasks = [{"do": "hang", "seconds": 3.0}] * 3 + [{"do": "nothing"}] * 3
    attempts, _ = asyncio.run(
        attempts_of(tasks, isolation, agent=f"bad_agents.py:{agent}", timeout=0.3, folder=tmp_path)
    )
    assert [attempt.end_reason for attempt in attempts] == ["timeout"] * 3 + ["ok"] * 3


def test_a_plain_function_that_overruns_in_a_thread_is_counted(tmp_path: Path) -> None:
    tasks = [{"do": "hang", "seconds": 2.0}]
    attempts, _ = asyncio.run(attempts_of(tasks, "thread", timeout=0.2, folder=tmp_path))
    assert "cannot be stopped" in (attempts[0].error or "")
    assert left_threads() >= 1
    for thread in threading.enumerate():
        if thread.name == "agent":
            thread.join(10)
    assert left_threads() == 0


def test_a_coroutine_that_ignores_its_end_does_not_hold_the_runner() -> None:
    bad_agents.SEEN.clear()
    tasks = [{"do": "ignore"}, {"do": "nothing"}]
    attempts, _ = asyncio.run(
        attempts_of(tasks, "thread", agent=bad_agents.misbehaves_async, timeout=0.2)
    )
    assert [attempt.end_reason for attempt in attempts] == ["timeout", "ok"]
    assert "ignored" in bad_agents.SEEN


@pytest.mark.parametrize("isolation", ["inline", "thread"])
def test_a_copy_that_a_plain_function_forks_does_not_come_back(isolation: str) -> None:
    attempts, spans = asyncio.run(attempts_of([{"do": "fork"}], isolation))
    assert (attempts[0].end_reason, attempts[0].reward) == ("ok", 1.0)
    assert len(spans[0]) == 1


def test_output_of_a_process_is_kept_with_its_attempt() -> None:
    tasks = [{"do": "os_exit"}]
    attempts, spans = asyncio.run(attempts_of(tasks, "process"))
    assert attempts[0].end_reason == "agent_error"
    assert "code 7" in (attempts[0].error or "")
    assert [row["attributes"]["tail"] for row in spans[0]] == ["good bye\n"]


@pytest.mark.parametrize("isolation", ALL)
def test_spans_of_opentelemetry_are_the_attempts_wherever_it_runs(isolation: str) -> None:
    attempts, spans = asyncio.run(attempts_of([{"do": "span"}], isolation))
    assert attempts[0].end_reason == "ok"
    rows = {row["name"]: row for row in spans[0] if row["reward"] != 1.0}
    assert rows.keys() == {"agentlightning.annotation", "tool", "open"}
    assert rows["agentlightning.annotation"]["parent_id"] == rows["tool"]["span_id"]
    assert len({row["trace_id"] for row in spans[0]}) == 1
