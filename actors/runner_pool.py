"""One pool of runners: keeps as many alive as there should be and tells the store at once when one dies.

Not an actor of its own: a helper inside the controller (`actors.runner_pools`), which owns the runners (when the controller dies, Ray ends
them). Each runner has a place, a task that starts it, replaces it when it dies, and ends with it.

    loop      consumes                       produces              waits for
    place     a runner's life                the next runner       its start, at most start_seconds of the pool; then its end, of which Ray tells
    grow      a queue that does not empty    places                the store (a condition there), a place that is free, runners that start, earlier pools
    watch     a runner's answers             its death, if none    the runner's event loop, at most runner_watch.LEASES leases
    shrink    a runner without work          its end               the runner (a condition there), the others

Test alone: tests/integration/test_runner_pool.py, test_runner_elastic.py.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.runner import Runner, runner_options
from actors.runner_start import NotStarted, first_line, started, whole
from actors.runner_watch import until_deaf
from agl_ray.agents import NO_HOST, Hook, Host, LitAgent
from agl_ray.config import RunConfig
from agl_ray.config.runners import FIRST, place_of
from agl_ray.judge.settle import Judges
from agl_ray.store import LightningStore
from agl_ray.types import RunError, new_id
from agl_ray.waits import wait

STOP = 8.0  # seconds that a runner gets to leave on its own
FAST_DEATHS = 5  # runners that may die within QUICK seconds of their start, in a row, before the run is stopped
QUICK = 10.0
GROW_AFTER = 1.0  # seconds that rollouts must have waited before runners are added
HEAR = 3600.0  # seconds of one wait for the queue; nothing hangs on it
REST = 60.0  # seconds before a runner that found no place is asked for again

log = logging.getLogger(__name__)


class RunnerPool:
    """`supervise()` places the runners, replaces the dead, grows and shrinks where `max_runners` says so, until `stop()`.

    name: which of `runners.by_name`. earlier: the pools that grow before this one. notice: called with what the person should know when a
    runner died and was replaced; remark: when one cannot start. hooks: around every rollout. host: what agents are told. judges: who
    gives the rewards; None: the agent does.
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
        remark: Callable[[str], None] = log.warning,
        hooks: tuple[Hook, ...] = (),
        host: Host = NO_HOST,
        judges: Judges | None = None,
        name: str = FIRST,
        earlier: tuple[RunnerPool, ...] = (),
    ) -> None:
        self.config, self.store, self.agent = config, store, agent
        self.name, self.runners, self.earlier = name, config.runners.by_name[name], earlier
        self.base, self.namespace = base, namespace
        self.notice, self.remark = notice, remark
        self.hooks, self.host, self.judges = hooks, host, judges
        self._handles: dict[str, ActorHandle] = {}
        self._starting: set[str] = set()
        self._leaving: set[str] = set()
        self._deaf: dict[str, str] = {}  # runners that were killed here -> why
        self._tasks: set[asyncio.Task[None]] = set()
        self._growing: asyncio.Task[None] | None = None
        self._staying = 0  # places whose runner was not asked to leave
        self._num_made = 0
        self._news = asyncio.Event()  # of what is above
        self._over = asyncio.Event()
        self._error: BaseException | None = None
        self._refused = False
        self._stopping = False

    @property
    def num_runners(self) -> int:
        """Runners that are there or start, without those that leave."""
        return self._staying

    @property
    def exhausted(self) -> bool:
        """Whether it will add none now: it has all that it may have, or its last found no place."""
        full = self._refused or self._staying >= self.runners.most
        return full and not self._starting

    async def until_exhausted(self) -> None:
        await self._until(lambda: self.exhausted)

    async def supervise(self) -> None:
        """Keep the pool as it should be until `stop`; RunError when runners die as fast as they start, or cannot start."""
        for _ in range(self.runners.fewest):
            self._add()
        if self.runners.elastic:
            self._growing = self._begin(self._grow())
        await self._over.wait()
        if self._error is not None:
            raise self._error

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._error = self._error or error
            self._over.set()

    def _tell(self) -> None:
        """Something of the pool's size has changed."""
        self._news.set()
        self._news = asyncio.Event()

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            await self._news.wait()

    # Growing and shrinking -------------------------------------------------------------------------

    async def _grow(self) -> None:
        """Add places while rollouts wait and nobody takes them."""
        runners = self.runners
        while True:
            await self._until(lambda: self._staying < runners.most and not self._starting)
            if self._refused:
                await asyncio.sleep(REST)
                self._refused = False
                self._tell()
            for pool in self.earlier:
                await pool.until_exhausted()
            waiting = await self.store.wait_for_queue(standing=GROW_AFTER, timeout=HEAR)
            if not all(pool.exhausted for pool in self.earlier):
                continue
            wanted = math.ceil(waiting / runners.concurrency)
            for _ in range(min(wanted, runners.most - self._staying)):
                self._add()

    def _add(self) -> None:
        self._staying += 1
        self._begin(self._place(self._num_made, self._named(self._num_made)))
        self._num_made += 1
        self._tell()

    async def _shrink(self, worker_id: str, handle: ActorHandle) -> None:
        """Ask this runner to leave once it has long been idle, should the pool be larger than it must."""
        runners = self.runners
        while True:
            await self._until(lambda: self._staying > runners.fewest)
            try:
                await handle.idle.remote(runners.idle_seconds)
                if self._staying > runners.fewest:
                    self._give_up(worker_id)
                    on = f"{worker_id} to hear that it may leave"
                    await wait(handle.drain.remote(), on=on, seconds=runners.start_seconds)
                    return
            except ray.exceptions.RayActorError:
                return  # its place hears of it, too

    def _give_up(self, worker_id: str) -> None:
        """This place ends with its runner."""
        self._leaving.add(worker_id)
        self._staying -= 1
        self._tell()

    # Places -----------------------------------------------------------------------------------------

    def _named(self, index: int) -> str:
        """Unique over the cluster and over restarts; the index is for people."""
        worker_id = f"{self.name}-{index}-{new_id('w')[2:]}"
        self._starting.add(worker_id)
        return worker_id

    async def _place(self, index: int, worker_id: str) -> None:
        """The lives of the runners of one place, of which `worker_id` is the first."""
        quick_deaths = 0
        while not self._stopping:
            try:
                quick_deaths = await self._live(worker_id, quick_deaths)
            except NotStarted as error:
                if self._staying <= self.runners.fewest:
                    raise
                self._refused = True
                self._give_up(worker_id)
                self.remark(f"{error}; the run goes on without it")
            finally:
                self._handles.pop(worker_id, None)
                self._starting.discard(worker_id)
                self._tell()
            if worker_id in self._leaving:
                self._leaving.discard(worker_id)
                return
            worker_id = self._named(index)

    async def _live(self, worker_id: str, quick_deaths: int) -> int:
        """One runner's life. How many that died quickly there have been in a row with this one; RunError where they are too many."""
        loop = asyncio.get_running_loop()
        handle = self._handles[worker_id] = self._create(worker_id)
        began: float | None = None
        beside: list[asyncio.Task[None]] = []
        try:
            await started(handle, worker_id, self.runners, place_of(self.name), self.remark)
            began = loop.time()
            self._starting.discard(worker_id)
            self._tell()
            beside.append(self._begin(self._watch(worker_id, handle)))
            if self.runners.elastic:
                beside.append(self._begin(self._shrink(worker_id, handle)))
            await handle.run.remote()  # ends when the runner leaves; Ray raises when it dies
            # What the store leased to it while it was leaving.
            await self.store.worker_lost(worker_id, "its runner was stopped")
        except ray.exceptions.RayActorError as error:
            if self._stopping:
                return 0
            quick = began is None or loop.time() - began < QUICK
            quick_deaths = quick_deaths + 1 if quick else 0
            said = whole(error) if began is None else first_line(error)
            await self._bury(worker_id, self._deaf.pop(worker_id, said))
            if quick_deaths >= FAST_DEATHS:
                raise RunError(
                    f"runner pool: {FAST_DEATHS} runners of one place in a row died within {QUICK:g} s of their start, "
                    f"the last of them ({worker_id}) of this: {whole(error)}"
                ) from error
        except NotStarted:
            ray.kill(handle)  # it would take a place that is free too late
            raise
        finally:
            for task in beside:
                task.cancel()
        return quick_deaths

    async def _watch(self, worker_id: str, handle: ActorHandle) -> None:
        """Kill this runner should its event loop stand still; its place buries it."""
        try:
            lease = self.config.runners.lease_seconds
            self._deaf[worker_id] = await until_deaf(handle, worker_id, lease)
            ray.kill(handle)
        except ray.exceptions.RayActorError:
            return  # its place hears of it, too

    async def _bury(self, worker_id: str, why: str) -> None:
        lost = await self.store.worker_lost(worker_id, f"its process died: {why}")
        after = "it was leaving" if worker_id in self._leaving else "a new runner starts"
        self.notice(
            f"{worker_id} died; {len(lost)} attempts ended as lost and were queued again; {after}. {why}"
        )

    def _create(self, worker_id: str) -> ActorHandle:
        runners = self.runners
        options = runner_options(worker_id, runners) | {"namespace": self.namespace}
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
                lease_seconds=self.config.runners.lease_seconds,
                tracing=self.config.tracing,
                otlp=self.config.store.door,
                isolation=runners.isolation,
                hooks=self.hooks,
                host=self.host,
                judges=self.judges,
            )
        )

    # The end ----------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Ask every runner to leave; kill those that have not after STOP seconds."""
        self._stopping = True
        if self._growing is not None:
            self._growing.cancel()
        for worker_id, handle in self._handles.items():
            if worker_id in self._starting:
                ray.kill(handle)
            else:
                handle.stop.remote()
        await self._all_gone()
        for handle in self._handles.values():
            ray.kill(handle)
        await self._all_gone()
        self._over.set()

    async def _all_gone(self) -> None:
        """Until every place has ended, at most STOP seconds."""
        if self._tasks:
            await wait(
                asyncio.wait(self._tasks, timeout=STOP),
                on=f"runners {sorted(self._handles)} to leave",
                seconds=STOP + 1,
            )
