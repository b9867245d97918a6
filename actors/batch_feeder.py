"""BatchFeeder: the controller's feeder loop. Every slot that the window opens is filled with a group; whole batches are handed out.

A helper inside the controller, plain asyncio over the windowed queue (which slot may start) and the groups (what fills it). Test it
alone with tests/unit/test_batch_feeder.py.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

from actors.rollout_groups import GroupRollouts
from actors.run_events import RunEvents
from agl_ray.config import RunConfig
from agl_ray.ops.events import Progress
from agl_ray.schedule import WindowedQueue
from agl_ray.trajectory.batch import GroupPlan, TrainBatch
from agl_ray.types import RunError


class BatchFeeder:
    """An async context: it feeds inside of the block. first_batch: the finished steps of the run."""

    def __init__(
        self, config: RunConfig, groups: GroupRollouts, said: RunEvents, *, first_batch: int
    ) -> None:
        self.config, self.groups, self._said = config, groups, said
        self._queue: WindowedQueue[GroupPlan | None] = WindowedQueue(
            groups_per_batch=config.rollout.groups_per_step,
            staleness=config.train.staleness,
            num_batches=config.train.steps,
            first_batch=first_batch,
        )
        self._done: dict[int, int] = {}
        self._short = False  # the last batch lacked groups with signal

    async def __aenter__(self) -> BatchFeeder:
        self._feeding = asyncio.ensure_future(self._feed())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._feeding.cancel()
        await asyncio.gather(self._feeding, return_exceptions=True)

    async def _feed(self) -> None:
        """Hand every free slot a group; ends when the run has no more slots."""
        async with asyncio.TaskGroup() as tasks:
            while (slot := await self._queue.start_slot()) is not None:
                tasks.create_task(self._fill(slot))

    async def _fill(self, slot: int) -> None:
        step = slot // self._queue.groups_per_batch + 1
        group = await self.groups.group(step, lambda count: self._progress(step, count))
        await self._queue.finish(slot, group)

    def _progress(self, step: int, count: int) -> None:
        self._done[step] = self._done.get(step, 0) + count
        total = self.config.rollouts_per_step
        name = f"rollouts of step {step}"
        self._said.tell_soon(Progress(name=name, done=self._done[step], total=total))

    async def next_batch(self, step: int) -> TrainBatch:
        """The next batch, which is that of `step`, or the feeder's error: a queue that is not fed would never be full."""
        slots = asyncio.ensure_future(self._queue.next_batch())
        await asyncio.wait({slots, self._feeding}, return_when=asyncio.FIRST_COMPLETED)
        if not slots.done() and self._feeding.done():
            slots.cancel()
            raise _first_error(self._feeding.exception())
        self._done.pop(step, None)
        batch = self.groups.batch(step, await slots)
        await self._say_if_short(batch)
        return batch

    async def _say_if_short(self, batch: TrainBatch) -> None:
        """A notice where groups are missing; of a row of such steps, for the first."""
        short = batch.sampled.get("groups_short", 0) > 0
        if short and not self._short:
            await self._said.notice(
                f"step {batch.step}: {len(batch.groups)} of {self.config.rollout.groups_per_step} groups have signal after "
                f"{batch.sampled['groups_refilled']:g} further ones (algorithm.refill_batches); the run goes on with those"
            )
        self._short = short

    async def advance(self, step: int) -> None:
        """The weights of version `step` are in the engines: opens slots."""
        await self._queue.advance(step)


def _first_error(error: BaseException | None) -> BaseException:
    """The first real error inside (possibly nested) exception groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error or RunError("the feeder ended before the run did")
