"""Agents that need no model, for tests of runners, groups and runs."""

from __future__ import annotations

import asyncio
import os
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
async def raises(task: dict[str, Any]) -> float:
    raise KeyError("no such tool: search")


@agl.rollout
async def not_a_number(task: dict[str, Any]) -> float:
    return float("nan")
