"""All that runs rollouts in a run: its pools of runners, and the judges that they ask.

A helper inside the controller. The pools take from one queue and know of each other only who grows first. Test alone:
tests/integration/test_runner_elastic.py, test_runner_judge.py.
"""

from __future__ import annotations

import asyncio
from typing import Any

from actors.judge import JudgePool
from actors.runner_pool import RunnerPool
from agl_ray.agents import LitAgent
from agl_ray.config import RunConfig
from agl_ray.store import LightningStore


class RunnerPools:
    """One `RunnerPool` for each of `runners.by_name`; what else it takes is theirs."""

    def __init__(
        self,
        config: RunConfig,
        store: LightningStore,
        agent: LitAgent | str,
        *,
        base: str,
        namespace: str,
        **told: Any,
    ) -> None:
        self._judges: JudgePool | None = None
        if config.judge.on:
            self._judges = JudgePool(config.judge, base=base, namespace=namespace)
            told["judges"] = self._judges.client
        self.pools: tuple[RunnerPool, ...] = ()
        for name in config.runners.by_name:
            given = {**told, "base": base, "namespace": namespace, "earlier": self.pools}
            self.pools += (RunnerPool(config, store, agent, name=name, **given),)

    async def supervise(self) -> None:
        """Keep the pools as they should be until `stop`; the first error of one of them, or of the judges' start."""
        if self._judges is not None:
            await self._judges.start()
        await asyncio.gather(*(pool.supervise() for pool in self.pools))

    async def stop(self) -> None:
        """End the runners, then the judges."""
        await asyncio.gather(*(pool.stop() for pool in self.pools))
        if self._judges is not None:
            self._judges.stop()
