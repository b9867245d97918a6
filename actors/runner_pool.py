"""The pool of runners: keeps `num_runners` alive and tells the store at once when one dies.

Not an actor of its own: a helper inside the controller, which owns the runners (when the controller dies, Ray ends them).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import ray
from ray.actor import ActorHandle

from actors.judge import JudgePool
from actors.runner import Runner, runner_options
from agl_ray.agents import NO_HOST, Hook, Host, LitAgent
from agl_ray.config import RunConfig
from agl_ray.store import LightningStore
from agl_ray.types import RunError, new_id
from agl_ray.waits import wait

STOP = 8.0  # seconds that a runner gets to leave on its own
FAST_DEATHS = 5  # runners that may die within QUICK seconds of their start, in a row, before the run is stopped
QUICK = 10.0


class RunnerPool:
    """`start()` places the runners, `supervise()` runs until `stop()` and replaces the dead.

    notice: called with one sentence for the person when a runner died and was replaced. hooks: around every rollout. host: what
    agents are told.
    """

    def __init__(
        self,
        config: RunConfig,
        store: LightningStore,
        agent: LitAgent | str,
        *,
        base: str,
        namespace: str,
        notice: Callable[[str], None],
        hooks: tuple[Hook, ...] = (),
        host: Host = NO_HOST,
    ) -> None:
        self.config, self.store, self.agent = config, store, agent
        self.base, self.namespace, self.notice = base, namespace, notice
        self.hooks, self.host = hooks, host
        self._judges: JudgePool | None = None
        if config.judge.on:
            self._judges = JudgePool(config.judge, base=base, namespace=namespace)
        self._handles: dict[str, ActorHandle] = {}
        self._empty = asyncio.Event()
        self._stopping = False

    async def supervise(self) -> None:
        """Keep every place of the pool filled until `stop`; RunError when runners die as fast as they start."""
        if self._judges is not None:
            await self._judges.start()
        await asyncio.gather(*(self._place(i) for i in range(self.config.runners.num_runners)))

    async def _place(self, index: int) -> None:
        loop = asyncio.get_running_loop()
        quick_deaths = 0
        while not self._stopping:
            # Unique over the cluster and over restarts; the index is for people.
            worker_id = f"runner-{index}-{new_id('w')[2:]}"
            handle = self._create(worker_id)
            self._handles[worker_id] = handle
            self._empty.clear()
            started = loop.time()
            try:
                await (
                    handle.run.remote()
                )  # ends when the runner is stopped; Ray raises when it dies
                # What the store leased to it while it was leaving.
                await self.store.worker_lost(worker_id, "its runner was stopped")
                return
            except ray.exceptions.RayActorError as error:
                if self._stopping:
                    return
                quick_deaths = quick_deaths + 1 if loop.time() - started < QUICK else 0
                await self._bury(worker_id, error)
            finally:
                self._handles.pop(worker_id, None)
                if not self._handles:
                    self._empty.set()
            if quick_deaths >= FAST_DEATHS:
                raise RunError(
                    f"runner place {index}: {FAST_DEATHS} runners in a row died within {QUICK:g} s of their start; "
                    "see the newest worker log in the Ray session folder for the reason"
                )

    async def _bury(self, worker_id: str, error: Exception) -> None:
        lost = await self.store.worker_lost(worker_id, f"its process died: {_first_line(error)}")
        self.notice(
            f"{worker_id} died; {len(lost)} attempts ended as lost and were queued again; a new runner starts"
        )

    def _create(self, worker_id: str) -> ActorHandle:
        runners = self.config.runners
        options = runner_options(worker_id, runners.num_cpus) | {"namespace": self.namespace}
        return (  # type: ignore[no-any-return]
            ray.remote(Runner)
            .options(**options)
            .remote(
                worker_id,
                self.store,
                self.agent,
                base=self.base,
                concurrency=runners.concurrency,
                timeout_seconds=self.config.rollout.timeout_seconds,
                lease_seconds=runners.lease_seconds,
                tracing=self.config.tracing,
                otlp=self.config.store.door,
                isolation=runners.isolation,
                hooks=self.hooks,
                host=self.host,
                judges=None if self._judges is None else self._judges.client,
            )
        )

    async def stop(self) -> None:
        """Ask every runner to leave; kill those that have not after STOP seconds, and the judges then."""
        await self._stop_runners()
        if self._judges is not None:
            self._judges.stop()

    async def _stop_runners(self) -> None:
        self._stopping = True
        handles = dict(self._handles)
        for handle in handles.values():
            handle.stop.remote()
        if not handles:
            return
        try:
            await wait(self._empty.wait(), on=f"runners {sorted(handles)} to leave", seconds=STOP)
        except TimeoutError:
            for handle in list(self._handles.values()):
                ray.kill(handle)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
