"""Run an agent on one attempt, under a deadline: on this loop, in a thread, or as all there is in a process of its own.

Called by the runner actor, by the child of a fork server, and by `agl_ray.agents.dev`; a unit test calls it without Ray. What comes out is
an `Outcome`: an end reason and, only for `ok`, a reward. A failure is never a reward (contract 1).
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections.abc import Coroutine, Sequence
from typing import Any

from agl_ray.agents.agent import LitAgent, RolloutContext
from agl_ray.agents.attempt_tasks import AttemptTasks
from agl_ray.agents.calling import call, in_thread, in_threads
from agl_ray.agents.hooks import Hook, HookRunner, Hooks
from agl_ray.agents.outcome import Outcome, raised, returned
from agl_ray.agents.roles import NO_KEY, endpoints
from agl_ray.tracing import SpanRecorder, recording
from agl_ray.types import LLM, AttemptedRollout, EndReason, NamedResources, Record, replace
from agl_ray.waits import wait

LEFT = "; it cannot be stopped where it is and goes on in vain (runners.isolation: process ends such agents)"
HOOK_SECONDS = 30.0  # of the hooks at the end, which come after the agent's deadline


class Place(enum.Enum):
    """Where the agent runs."""

    INLINE = "inline"  # a coroutine on this loop, a plain function in a thread
    THREAD = "thread"  # all of it in a thread, on a loop of its own
    HERE = "here"  # all of it here, plain functions too: this process has nothing else to do


class Host(Record, frozen=True):
    """What a runner tells the agents that it runs, beside their attempt; see RolloutContext. store_key: what callers of the store's
    doors must show, None: nothing; programs find it in AGL_STORE_API_KEY."""

    worker_id: str = "local"
    store_url: str | None = None
    store_key: str | None = None
    artifacts_folder: str | None = None


NO_HOST = Host()


def resources_for(attempt: AttemptedRollout, resources: NamedResources) -> NamedResources:
    """The resources as this attempt sees them: every LLM of our gateway points at the attempt's own URL."""
    return {
        name: replace(
            resource,
            endpoint=resource.get_base_url(attempt.rollout_id, attempt.attempt_id),
            api_key=resource.api_key or NO_KEY,
            gateway=False,
        )
        if isinstance(resource, LLM)
        else resource
        for name, resource in resources.items()
    }


def context_of(
    attempt: AttemptedRollout,
    timeout_seconds: float | None,
    resources: NamedResources,
    host: Host = NO_HOST,
) -> RolloutContext:
    """The context object of an attempt; step, group index and weight version come from the rollout's metadata. InputError where that names an
    LLM resource that is not there."""
    metadata = attempt.rollout.metadata
    return RolloutContext(
        rollout_id=attempt.rollout_id,
        attempt_id=attempt.attempt_id,
        mode=attempt.rollout.mode,
        step=metadata.get("step"),
        group_index=metadata.get("group_index"),
        weight_version=metadata.get("weight_version"),
        attempt_number=attempt.attempt.sequence_id,
        timeout_seconds=timeout_seconds,
        store_url=host.store_url,
        artifacts_folder=host.artifacts_folder,
        llms=endpoints(attempt, resources),
    )


async def run_agent(
    agent: LitAgent,
    attempt: AttemptedRollout,
    resources: NamedResources,
    recorder: SpanRecorder,
    timeout_seconds: float | None,
    *,
    hooks: Sequence[Hook] = (),
    host: Host = NO_HOST,
    place: Place = Place.INLINE,
) -> Outcome:
    """Run `agent` on the attempt's input for at most `timeout_seconds` (None: as long as it takes) and say how it ended; never raises for the agent's faults.

    At the deadline a coroutine is cancelled, with the tasks that it has begun. A plain function cannot be stopped inside its thread, nor a
    coroutine that ignores its cancellation: they are left behind, and the gateway refuses their later calls because the attempt has ended.
    Tasks that an agent leaves behind end with its attempt, too (`AttemptTasks.stop_own`). OK without a reward: it
    gave none itself (`outcome.settled`).
    """
    apart = place is not Place.HERE
    try:
        ctx = context_of(attempt, timeout_seconds, resources, host)
        own = agent.fresh()
        around = Hooks(hooks, own, HookRunner(host.worker_id, ctx), attempt, recorder, apart=apart)
        work = _work(own, attempt, resources_for(attempt, resources), ctx, recorder, around, place)
    except Exception as error:  # noqa: BLE001  the agent's own `fresh` may raise anything
        return raised(error, attempt)
    if place is Place.THREAD:
        work = _in_own_loop(work)
    tasks = AttemptTasks()
    outcome = await _until(tasks, work, attempt, timeout_seconds)
    try:
        ending = tasks.begin(around.rollout_end(outcome))
        await wait(ending, on="the hooks' on_rollout_end", seconds=HOOK_SECONDS)
        await tasks.stop_own()
    except Exception as error:  # noqa: BLE001  a hook may raise anything
        return raised(error, attempt)
    return outcome


async def _work(
    agent: LitAgent,
    attempt: AttemptedRollout,
    resources: NamedResources,
    ctx: RolloutContext,
    recorder: SpanRecorder,
    hooks: Hooks,
    place: Place,
) -> Outcome:
    with recording(recorder):
        await hooks.rollout_start()
        await hooks.trace_start()
        function, arguments = agent.bound(attempt, resources, ctx)
        value = await call(function, arguments, apart=place is Place.INLINE)
        await hooks.trace_end()
    return returned(value, recorder)


async def _until(
    tasks: AttemptTasks,
    work: Coroutine[Any, Any, Outcome],
    attempt: AttemptedRollout,
    seconds: float | None,
) -> Outcome:
    """The outcome of `work`, in a task of its own: one that ignores its cancellation must not hold us."""
    threads: list[asyncio.Future[Any]] = []
    in_threads.set(threads)
    task = tasks.begin(work)
    ends: set[asyncio.Future[Any]] = {task, tasks.exited}
    try:
        done, _ = await asyncio.wait(ends, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if tasks.exited in done:  # also where nobody awaited the task that did it
            await tasks.stop()
            return raised(tasks.exited.result(), attempt)
        if not done:
            left = await tasks.stop() or not all(one.done() for one in threads)
            return overrun(seconds, LEFT if left else "")
        await tasks.stop_own()
    except asyncio.CancelledError:
        await tasks.stop()
        raise
    error = asyncio.CancelledError() if task.cancelled() else task.exception()
    return task.result() if error is None else raised(error, attempt)


def overrun(seconds: float | None, more: str = "") -> Outcome:
    """The outcome of an agent whose deadline passed."""
    text = f"the agent ran longer than {seconds or 0:g} s{more}"
    return Outcome(reason=EndReason.TIMEOUT, error=text)


async def _in_own_loop(work: Coroutine[Any, Any, Outcome]) -> Outcome:
    """`work` in a thread with a loop of its own; cancelled, it is cancelled there."""
    begun: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

    async def main() -> Outcome:
        task = asyncio.current_task()
        assert task is not None
        begun.append((asyncio.get_running_loop(), task))
        return await work

    def stop() -> None:
        for loop, task in begun:
            with contextlib.suppress(RuntimeError):  # it has just ended and closed its loop
                loop.call_soon_threadsafe(task.cancel)

    outcome: Outcome = await in_thread(lambda: asyncio.run(main()), stop)
    return outcome
