"""Runner: leases rollouts from the store and runs the agent on them, many at once.

One Ray actor of a pool (`actors.runner_pool`). It holds no state that matters: when it dies, Ray says so at once, the store
ends its open attempts as `lost` and queues their rollouts again, and the pool starts another runner.

    loop      consumes             produces                       waits for
    lease     free places          attempts                       the store's queue (long poll), at most LEASE_POLL seconds
    attempt   one attempt          spans, reward, end reason      the agent, at most the rollout's deadline
    renew     the clock            lease renewals                 the store

`stop` cancels what is open; `drain` lets it end. Test alone: tests/integration/test_runner_pool.py, test_runner_elastic.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import Any

from agl_ray.agents import NO_HOST, Hook, Host, LitAgent, Outcome, check_hooks, settled
from agl_ray.agents.attempt_tasks import left_tasks
from agl_ray.agents.calling import left_threads
from agl_ray.agents.command import STORE_KEY
from agl_ray.agents.isolation import isolated
from agl_ray.config.runners import RunnerPoolConfig
from agl_ray.config.tracing import TracingConfig
from agl_ray.judge import judged
from agl_ray.judge.settle import Judges
from agl_ray.spans import KIND_REWARD
from agl_ray.store import LightningStore
from agl_ray.tracing import SpanRecorder, SpanSender
from agl_ray.types import LLM, AttemptedRollout, EndReason, NamedResources, replace
from agl_ray.waits import wait

LEASE_POLL = 5.0  # seconds of one blocking dequeue
CLOSE = 5.0  # seconds that cancelled attempts get to report their end

log = logging.getLogger(__name__)


class Runner:
    """Runs attempts of one agent, up to `concurrency` at once.

    agent: a LitAgent (pickled), or its import string, resolved against `base`. isolation: as `runners.isolation`. timeout_seconds: deadline
    of an attempt whose rollout names none. lease_seconds: how long the store waits for a sign of life. host: what agents are told.
    otlp: the store's door is open beside the gateway, for spans of programs that the agent starts. judges: who gives the
    rewards; None: the agent does.
    """

    def __init__(
        self,
        worker_id: str,
        store: LightningStore,
        agent: LitAgent | str,
        *,
        base: str,
        concurrency: int,
        timeout_seconds: float,
        lease_seconds: float,
        tracing: TracingConfig,
        otlp: bool,
        isolation: str = "inline",
        hooks: tuple[Hook, ...] = (),
        host: Host = NO_HOST,
        judges: Judges | None = None,
    ) -> None:
        self.worker_id, self.store, self.judges = worker_id, store, judges
        self.otlp = otlp
        self.concurrency = concurrency
        self.host = replace(host, worker_id=worker_id)
        if host.store_key is not None:
            os.environ[STORE_KEY] = host.store_key  # for programs that the agent starts
        self._agents = isolated(agent, base, check_hooks(hooks), isolation, tracing.instrument)
        self.timeout_seconds, self.lease_seconds = timeout_seconds, lease_seconds
        self._open: dict[asyncio.Task[None], AttemptedRollout] = {}
        self._stopping = asyncio.Event()
        self._draining = False
        self._working, self._resting = asyncio.Event(), asyncio.Event()
        self._resting.set()
        self._finished = 0

    async def ping(self) -> str:
        return self.worker_id

    async def run(self) -> int:
        """Work until `stop` or `drain` is called; the number of attempts that were ended here."""
        renewal = asyncio.create_task(self._renew())
        stop = asyncio.create_task(self._stopping.wait())
        ends: set[asyncio.Future[Any]] = {stop}
        try:
            ends.add(await self._agents.start())
            ends.add(asyncio.create_task(self._work(renewal)))
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for end in done:
                end.result()  # raises, but for `stop` and `drain`: nothing else ends by itself without an error
        finally:
            for task in (renewal, *ends):
                task.cancel()
            await self._close()
            await self._agents.close()
        return self._finished

    async def _work(self, renewal: asyncio.Task[None]) -> None:
        while not self._draining:
            await self._lease(renewal)
        while self._open:  # each has its deadline
            await asyncio.wait(self._open, return_when=asyncio.FIRST_COMPLETED)

    async def drain(self) -> None:
        """Lease nothing more; `run` returns when what is open has ended, that of a lease that is on its way included."""
        self._draining = True

    async def idle(self, seconds: float) -> None:
        """Returns once nothing has been run here for `seconds`, counted from this call at the earliest."""
        while True:
            await self._resting.wait()
            try:
                async with asyncio.timeout(seconds):
                    await self._working.wait()
            except TimeoutError:
                return

    async def stop(self) -> None:
        """Lease nothing more; `run` returns after cancelling what is open."""
        self._stopping.set()

    async def _lease(self, renewal: asyncio.Task[None]) -> None:
        """Fill the free places, or wait until one is free."""
        if renewal.done():
            renewal.result()  # its error is ours: without renewals every lease here is void
        free = self.concurrency - len(self._open)
        if free == 0:
            await asyncio.wait(self._open, return_when=asyncio.FIRST_COMPLETED, timeout=LEASE_POLL)
            return
        leased = await self.store.dequeue_many_rollouts(
            limit=free, worker_id=self.worker_id, wait_seconds=LEASE_POLL
        )
        resources = {
            i: await self._resources_of(i) for i in {a.rollout.resources_id for a in leased}
        }
        for attempt in leased:
            task = asyncio.create_task(
                self._attempt(attempt, resources[attempt.rollout.resources_id])
            )
            self._open[task] = attempt
            self._resting.clear()
            self._working.set()
            task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        attempt = self._open.pop(task)
        if not self._open:
            self._working.clear()
            self._resting.set()
        if not task.cancelled() and task.exception() is not None:
            log.error(
                "attempt %s could not be ended", attempt.attempt_id, exc_info=task.exception()
            )

    async def _resources_of(self, resources_id: str | None) -> NamedResources | None:
        """The newest version of these resources; None when the store does not know them."""
        if resources_id is None:
            return {}
        update = await self.store.get_resources_by_id(resources_id)
        return None if update is None else dict(update.resources)

    async def _attempt(self, attempt: AttemptedRollout, resources: NamedResources | None) -> None:
        endpoint = _otlp_endpoint(resources or {}) if self.otlp else None
        recorder = SpanRecorder(attempt.rollout_id, attempt.attempt_id, otlp_endpoint=endpoint)
        sender = SpanSender(self.store, recorder)
        limit = attempt.rollout.config.timeout_seconds or self.timeout_seconds
        if resources is None:
            missing = f"resources {attempt.rollout.resources_id!r} are not in the store"
            outcome = Outcome(reason=EndReason.ENV_ERROR, error=missing)
        else:
            try:
                give_up = time.monotonic() + limit
                outcome = await self._agents.run(attempt, resources, recorder, limit, self.host)
                if self.judges is not None:
                    left = give_up - time.monotonic()
                    outcome = await judged(
                        self.judges, self.store, attempt, outcome, recorder, left
                    )
            except asyncio.CancelledError:
                outcome = Outcome(reason=EndReason.CANCELLED, error="the runner was stopped")
        await self._end(attempt, outcome, recorder, sender)

    async def _end(
        self,
        attempt: AttemptedRollout,
        outcome: Outcome,
        recorder: SpanRecorder,
        sender: SpanSender,
    ) -> None:
        """Send the last spans with the attempt's end: it is acknowledged only when all its spans are."""
        if outcome.reward is not None and recorder.last_reward() != outcome.reward:
            recorder.add(
                name="agentlightning.annotation",
                kind=KIND_REWARD,
                reward=outcome.reward,
                reward_dimension="primary",
            )
        spans, batch_id = await sender.close()
        lost = recorder.why_lost()
        if lost is not None and outcome.reason is EndReason.OK:
            outcome = Outcome(reason=EndReason.LOST, error=lost)
        if outcome.reason is EndReason.OK and outcome.reward is None:
            if spans is not None:  # a reward may be among them; the end stores them no second time
                key = attempt.rollout_id, attempt.attempt_id
                await self.store.add_spans(*key, spans, batch_id=batch_id)
            outcome = settled(outcome, await self._posted(attempt))
        await self.store.end_attempt(
            attempt.rollout_id,
            attempt.attempt_id,
            outcome.reason,
            reward=outcome.reward,
            error=outcome.error,
            expected_spans=recorder.num_spans,
            spans=spans,
            batch_id=batch_id,
        )
        self._finished += 1

    async def _posted(self, attempt: AttemptedRollout) -> float | None:
        """The newest reward that came for the attempt by another way: over HTTP, from a program that the agent started."""
        from agl_ray.store.doors.facade_events import last_reward

        rows = await self.store.query_span_rows(attempt.rollout_id, attempt.attempt_id)
        return last_reward(rows)

    async def _renew(self) -> None:
        """Renew the leases of what is open, three times per lease."""
        while True:
            attempts = [(a.rollout_id, a.attempt_id) for a in self._open.values()]
            await self.store.update_worker(
                self.worker_id,
                heartbeat_stats={
                    "open": len(attempts),
                    "finished": self._finished,
                    "left_threads": left_threads(),
                    "left_tasks": left_tasks(),
                },
                attempts=attempts,
            )
            await asyncio.sleep(self.lease_seconds / 3)

    async def _close(self) -> None:
        """Cancel the open attempts and let each report its end."""
        tasks = list(self._open)
        for task in tasks:
            task.cancel()
        if tasks:
            await wait(
                asyncio.wait(tasks, timeout=CLOSE),
                on=f"{len(tasks)} open attempts of {self.worker_id} to end",
                seconds=CLOSE + 1,
            )


def _otlp_endpoint(resources: NamedResources) -> str | None:
    """The store's OTLP door, which is beside the gateway."""
    gateways = (one for one in resources.values() if isinstance(one, LLM) and one.gateway)
    return next((f"{one.endpoint.rstrip('/')}/v1/traces" for one in gateways), None)


def runner_options(worker_id: str, runners: RunnerPoolConfig) -> dict[str, Any]:
    """Ray options of a runner actor. It is not restarted by Ray: the pool replaces it under a new worker id, so that a
    late word from the old one can never be taken for the new one's."""
    given = runners.runtime_env
    return {
        "name": worker_id,
        "num_cpus": runners.num_cpus,
        "resources": dict(runners.resources),
        "max_restarts": 0,
        "max_concurrency": 16,
        "scheduling_strategy": "SPREAD",
        "runtime_env": {
            **given,
            "env_vars": {"OMP_NUM_THREADS": "1", **given.get("env_vars", {})},
        },
    }
