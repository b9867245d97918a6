"""Rollouts per minute of an agent that does nothing, through one real runner and the store actor. Called by `agl_ray.bench.gateway`."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import agl_ray as agl
from agl_ray.bench.store_places import NAMESPACE
from agl_ray.config.models import RunConfig
from agl_ray.store import LightningStore
from agl_ray.types import EnqueueRolloutRequest, RunError
from agl_ray.waits import wait

LIMIT_SECONDS = 600.0
AT_ONCE = 500  # rollouts of one call to the store


@agl.rollout
async def idle(task: dict[str, Any]) -> float:
    """The reward, and nothing else."""
    return 1.0


async def rollouts_per_min(config: RunConfig, store: LightningStore, number: int) -> dict[str, Any]:
    """`rollouts` and `rollouts_per_min`, after a warm-up of a tenth. RunError where one did not succeed."""
    from actors.runner_pool import RunnerPool

    notices: list[str] = []
    agent = "agl_ray.bench.gateway_rollouts:idle"
    pool = RunnerPool(
        config, store, agent, base=str(Path.cwd()), namespace=NAMESPACE, notice=notices.append
    )
    supervision = asyncio.ensure_future(pool.supervise())
    try:
        await _finish(store, max(1, number // 10))
        begin = time.perf_counter()
        await _finish(store, number)
        seconds = time.perf_counter() - begin
    finally:
        await pool.stop()
        await supervision
    if notices:
        raise RunError(f"the runner pool of the benchmark: {notices[0]}")
    return {"rollouts": number, "rollouts_per_min": 60 * number / seconds}


async def _finish(store: LightningStore, number: int) -> None:
    """Queue so many rollouts and wait for the end of all."""
    requests = [EnqueueRolloutRequest(input={"i": i}) for i in range(number)]
    queued: list[str] = []
    for at in range(0, number, AT_ONCE):
        made = await store.enqueue_many_rollouts(requests[at : at + AT_ONCE])
        queued += [rollout.rollout_id for rollout in made]
    on = f"{number} rollouts of the benchmark to end"
    ended = await wait(
        store.wait_for_rollouts(rollout_ids=queued, timeout=LIMIT_SECONDS),
        on=on,
        seconds=LIMIT_SECONDS + 5,
    )
    if len(ended) != number or any(one.status != "succeeded" for one in ended):
        raise RunError(f"{on}: {len(ended)} ended, not all of them well")
