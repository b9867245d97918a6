"""`runners.isolation`: the two ways to run an agent's attempts behind one face.

    agents = isolated(agent, base, hooks, "process")
    failing = await agents.start()
    outcome = await agents.run(attempt, resources, recorder, timeout_seconds, host)
    await agents.close()

Called by the runner actor. Test alone: tests/unit/test_agents_isolation.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from agl_ray.agents.agent import LitAgent
from agl_ray.agents.execute import Host, Place, run_agent
from agl_ray.agents.hooks import Hook
from agl_ray.agents.loading import load_agent
from agl_ray.agents.outcome import Outcome
from agl_ray.agents.processes import AgentProcesses
from agl_ray.agents.wire import Source
from agl_ray.tracing import SpanRecorder
from agl_ray.types import AttemptedRollout, NamedResources


class _InProcess:
    """The agent in this process, on the runner's loop or in threads."""

    def __init__(self, agent: LitAgent, hooks: tuple[Hook, ...], place: Place) -> None:
        self._agent, self._hooks, self._place = agent, hooks, place

    async def start(self) -> asyncio.Future[None]:
        """Nothing to start; what is awaited never ends."""
        return asyncio.get_running_loop().create_future()

    async def run(
        self,
        attempt: AttemptedRollout,
        resources: NamedResources,
        recorder: SpanRecorder,
        timeout_seconds: float,
        host: Host,
    ) -> Outcome:
        return await run_agent(
            *(self._agent, attempt, resources, recorder, timeout_seconds),
            hooks=self._hooks,
            host=host,
            place=self._place,
        )

    async def close(self) -> None:
        """Nothing to close."""


class _InProcesses:
    """The agent in a process per rollout."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._processes: AgentProcesses | None = None

    async def start(self) -> asyncio.Future[None]:
        """Import the agent; what is returned fails should the fork server die."""
        self._processes = await AgentProcesses.start(self._source)
        self.run = self._processes.run
        return self._processes.failure

    async def close(self) -> None:
        if self._processes is not None:
            await self._processes.close()


def isolated(
    agent: LitAgent | str,
    base: str,
    hooks: tuple[Hook, ...],
    isolation: str,
    instruments: Sequence[str] | str,
) -> _InProcess | _InProcesses:
    """`agent` (a LitAgent, or its import string, resolved against `base`) as `isolation` (inline, thread, process) wants it.
    instruments: as `tracing.instrument`."""
    if isolation != "process":
        return _InProcess(load_agent(agent, base, instruments), hooks, Place(isolation))
    from ray import cloudpickle

    named = isinstance(agent, str)
    source = Source(
        pickled=cloudpickle.dumps((None if named else agent, hooks)),
        name=str(agent) if named else "",
        base=base,
        instruments=instruments if isinstance(instruments, str) else list(instruments),
    )
    return _InProcesses(source)
