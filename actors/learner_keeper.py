"""LearnerKeeper: the learner's ranks, made again whenever they are lost, always with the weights that the run is at.

A helper inside the controller. Its one road back is the journal: the newest checkpoint, then the stored steps trained again. A dead
rank, a dead controller and `--resume` all take it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from ray.actor import ActorHandle

from actors.learner_group import LearnerGroup, LearnerLost
from actors.weight_sync import SenderLost
from agl_ray.ops.ledger import Ledger
from agl_ray.store import LightningStore
from agl_ray.trajectory.batch import TrainBatch
from agl_ray.types import RunError, from_json
from agl_ray.waits import wait

T = TypeVar("T")

RESTARTS = 5  # in one run; more is a fault that restarting does not mend
TAKE_LEARNER = 30.0  # seconds for weight sync to take a new sender


def step_key(step: int) -> str:
    """Where the store keeps what step `step` was trained on (TrainBatch as JSON)."""
    return f"step/{step}"


class LearnerKeeper:
    """`at(step, work)` runs `work` on ranks that hold the weights of version `step`, however often they die meanwhile.

    ledger: where restarts are counted. notice: called with a sentence for the person and `learner`.
    """

    def __init__(
        self,
        group: LearnerGroup,
        store: LightningStore,
        sync: ActorHandle,
        ledger: Callable[[], Ledger],
        notice: Callable[[str, str], Awaitable[None]],
    ) -> None:
        self.group, self.store, self.sync = group, store, sync
        self._ledger, self._notice = ledger, notice

    async def at(self, step: int, work: Callable[[LearnerGroup], Awaitable[T]]) -> T:
        """The result of `work(group)`. RunError when the learner is lost more than RESTARTS times in the run."""
        while True:
            try:
                if not self.group.ranks:
                    await self._restore(step)
                return await work(self.group)
            except LearnerLost as error:
                await self._lost(error)

    async def _lost(self, error: LearnerLost) -> None:
        self.group.kill()
        before = self._ledger().restarts.get("learner", 0)
        if before == RESTARTS:
            raise RunError(
                f"the learner was lost {before + 1} times in this run; the last time: {error}"
            )
        await self._notice(f"{error}; the learner starts again from its last checkpoint", "learner")

    async def _restore(self, step: int) -> None:
        """A new group at `step`: newest checkpoint up to there, then the journalled steps again."""
        await self.group.start()
        loaded = await self.group.load_newest(step)
        for done in range(loaded + 1, step + 1):
            body = await self.store.get_state(step_key(done))
            if body is None:
                raise RunError(
                    f"step {done} is not in the store's journal: cannot make its weights again"
                )
            await self.group.train(from_json(body, TrainBatch), self.store)
        await wait(
            self.sync.set_learner.remote(self.group.rank0),
            on="weight sync to take the learner",
            seconds=TAKE_LEARNER,
        )

    async def publish(self, version: int, seconds: float) -> dict[str, Any]:
        """Stage the weights of `version` and bring them into every engine within `seconds`; WeightSync's account of it."""

        async def deliver(group: LearnerGroup) -> dict[str, Any]:
            manifest = await group.stage(version)
            try:
                result = await wait(
                    self.sync.publish.remote(manifest, seconds),
                    on=f"weights of version {version} to reach the engines",
                    seconds=seconds + 30,
                )
            except SenderLost as error:
                raise LearnerLost(f"learner rank 0 died while it sent version {version}") from error
            return dict(result)

        return await self.at(version, deliver)
