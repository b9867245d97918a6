"""Agents that need no model, for tests of runners, groups and runs."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import agl_ray as agl


@agl.rollout
async def slow_echo(task: dict[str, Any]) -> float:
    """Waits a little and returns the row's own reward."""
    await asyncio.sleep(task.get("seconds", 0.0))
    return float(task["reward"])


@agl.rollout
async def dies_once(task: dict[str, Any], ctx: agl.RolloutContext) -> float:
    """Kills its own runner process (as a kill -9 would) on the first attempt at the row that asks for it."""
    if task.get("die") and ctx.attempt_number == 1:
        await asyncio.sleep(0.3)
        os.kill(os.getpid(), 9)
    await asyncio.sleep(0.5)
    return float(task["reward"])


@agl.rollout
async def blocks_once(task: dict[str, Any], ctx: agl.RolloutContext) -> float:
    """A coroutine that holds its runner's loop up for `task["blocks"]` seconds, on the first attempt."""
    if ctx.attempt_number == 1:
        time.sleep(task["blocks"])  # noqa: ASYNC251
    return 1.0


@agl.rollout
async def raises(task: dict[str, Any]) -> float:
    raise KeyError("no such tool: search")


@agl.rollout
async def not_a_number(task: dict[str, Any]) -> float:
    return float("nan")


@agl.rollout
async def traced(task: dict[str, Any], ctx: agl.RolloutContext) -> float:
    """Makes the spans that `task["spans"]` counts with OpenTelemetry's SDK, in tasks, threads and pools, all named after the row."""
    from opentelemetry import trace

    tracer = trace.get_tracer("a library")
    name = str(task["row"])

    def step(where: str) -> None:
        with tracer.start_as_current_span(where, attributes={"row": name}):
            time.sleep(0.001)

    async def task_step() -> None:
        with tracer.start_as_current_span("task", attributes={"row": name}):
            await asyncio.sleep(0.005)
            await asyncio.to_thread(step, "to_thread")

    with tracer.start_as_current_span("agent", attributes={"row": name}):
        thread = threading.Thread(target=step, args=("thread",))
        thread.start()
        loop = asyncio.get_running_loop()
        pooled = [loop.run_in_executor(SHARED_POOL, step, "pool") for _ in range(3)]
        await asyncio.gather(*(task_step() for _ in range(3)), *pooled)
        await asyncio.to_thread(thread.join)
    agl.emit_reward(float(task["row"]))
    tracer.start_span("left open", attributes={"row": name})
    if task.get("spoil"):
        with tracer.start_as_current_span("spoiled") as span:
            span.set_attribute("agentlightning.reward.0.value", "high")
    return float(task["row"])


SHARED_POOL = ThreadPoolExecutor(2)


@agl.rollout
async def gives_nothing(task: dict[str, Any]) -> None:
    """Neither returns nor emits a reward: that is for a judge."""
    await asyncio.sleep(task.get("seconds", 0.0))


def judge_of_rows(task: dict[str, Any], reward: float | None) -> agl.Verdict:
    """The row's own score; a row may have the judge raise, or die on the first try."""
    if task.get("judge") == "raises":
        raise LookupError("no such rubric")
    marker = task.get("die_once")
    if marker is not None and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), 9)
    assert reward is None
    return agl.Verdict(reward=task["score"], dimensions={"style": 0.5}, comment="fine")


@agl.rollout
async def three_roles(task: dict[str, Any], ctx: agl.RolloutContext) -> None:
    """Asks a planner, a critic and a judge; gives the planner's call a reward of its own and leaves the rollout's to `judge_of_plans`."""
    from openai import AsyncOpenAI

    for role in ("planner", "critic", "judge"):
        llm = ctx.llm(role)
        async with AsyncOpenAI(base_url=llm.endpoint, api_key=llm.api_key) as client:
            messages: list[Any] = [{"role": "user", "content": task["question"]}]
            found = await client.chat.completions.create(model=llm.model, messages=messages)
        if role == "planner":
            agl.emit_reward(0.1 * (ctx.group_index or 0), call_id=found.id)
    agl.emit_object({"pid": os.getpid()})


@agl.rollout
async def two_writers(task: dict[str, Any], ctx: agl.RolloutContext) -> float:
    """Asks two roles; the reward is the parity of what each says. Asking none is refused."""
    from openai import AsyncOpenAI, NotFoundError

    reward = 0.0
    messages: list[Any] = [{"role": "user", "content": task["question"]}]
    for role in ("planner", "writer", None):
        llm = ctx.llm() if role is None else ctx.llm(role)
        async with AsyncOpenAI(base_url=llm.endpoint, api_key=llm.api_key) as client:
            asked = client.chat.completions.create(model=llm.model, messages=messages)
            try:
                found = await asked
            except NotFoundError as error:
                if role is not None or "must name one of planner, writer" not in str(error):
                    raise
                continue
        assert role is not None
        reward += sum((found.choices[0].message.content or "").encode()) % 2
    return reward


def judge_of_plans(calls: list[Any], reward: float | None) -> float:
    """The parity of what the planner said."""
    assert reward is None
    (plan,) = (call for call in calls if call.role == "planner")
    return float(sum((plan.response["content"] or "").encode()) % 2)
