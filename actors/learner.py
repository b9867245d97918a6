"""The Learner process: one FSDP rank, placed by the trainer; rank 0 also lays out the batch and holds the staged weights.

Called by the controller, in this order, each method on all ranks unless said otherwise:

    rank 0: address() -> setup(host, port) -> [load(path)] -> stage_weights(0)
    every step: rank 0: prepare(store, batch) -> refs; rank i: train(refs[i]); stage_weights(version); rank 0: send_weights(order)
    now and then: save(path), export(path)

To be placed with max_concurrency 2 or more: methods take turns by a lock, but for `address`, `version` and `send_weights`, so that an
engine that comes late gets its weights while the next step is trained. A rank whose peer dies fails in its collective with PeerLost
(at once under Gloo, at the latest after `learner.step_timeout_seconds`); the controller then replaces the whole group
and calls load. The work is in agl_ray/learner; test this file with tests/integration/test_learner_actor.py.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from agl_ray import waits
from agl_ray.config.models import RunConfig
from agl_ray.types.errors import RunError
from agl_ray.types.rollout import EndReason

if TYPE_CHECKING:
    import pyarrow as pa

    from agl_ray.learner.backend import Backend
    from agl_ray.learner.prepare import Payload
    from agl_ray.learner.teacher import Scores, Teacher
    from agl_ray.store.client import LightningStore
    from agl_ray.trajectory.batch import TrainBatch
    from agl_ray.trajectory.ragged import Rows
    from agl_ray.weights.sender import WeightSender


async def _read(store: LightningStore, batch: TrainBatch, seconds: float) -> pa.Table:
    """The spans of the batch's attempts, all of which must have ended `ok`. No method: an async one would make Ray run all on one loop."""
    attempts = await waits.wait(
        store.get_attempts([member.rollout_id for member in batch.members]),
        on=f"the store's attempts of training step {batch.step}",
        seconds=seconds,
    )
    ended = {(attempt.rollout_id, attempt.attempt_id): attempt for attempt in attempts}
    for member in batch.members:
        attempt = ended.get((member.rollout_id, member.attempt_id))
        if attempt is None or attempt.end_reason != EndReason.OK:
            reason = "is not the rollout's latest" if attempt is None else attempt.end_reason
            raise RunError(
                f"training step {batch.step}: expected attempt {member.attempt_id} of rollout {member.rollout_id} to have "
                f"ended ok, got: {reason}; a failure is never a reward"
            )
    return await waits.wait(
        store.read_spans(batch.attempts),
        on=f"the store's spans of training step {batch.step}",
        seconds=seconds,
    )


class PeerLost(RunError):
    """Another rank of the group died or fell silent during a collective; the group must be made again."""


class LearnerRank:
    """Rank `rank` of `world_size`. `config` is a RunConfig as a dictionary (`model_dump()`), `model_path` a Hugging Face folder,
    `base` the folder where files that the configuration names are looked up too."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        config: dict[str, Any],
        model_path: str,
        seed: int,
        base: str = ".",
    ) -> None:
        self.rank, self.world_size, self.model_path, self.seed = rank, world_size, model_path, seed
        self.base = Path(base)
        self.config = RunConfig.model_validate(config)
        self._turn = threading.Lock()
        self._learner: Backend | None = None
        self._sender: WeightSender | None = None
        self._teacher: Teacher | None = None

    def address(self) -> tuple[str, int]:
        """(host, free port) where the group may meet."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as free:
            free.bind(("", 0))
            port: int = free.getsockname()[1]
        return host, port

    def setup(self, master_addr: str, master_port: int) -> dict[str, int]:
        """Check the teacher (on rank 0, where there is one), join the ranks' group and load the model. Returns the number of parameters and the process id."""
        from agl_ray.learner.backend import Rank, open_backend

        teacher = self.config.algorithm.teacher
        if self.rank == 0 and teacher is not None:
            from agl_ray.learner.teacher import Teacher

            self._teacher = Teacher(teacher, self.config.learner.max_row_tokens)
            asyncio.run(self._teacher.check(Path(self.model_path)))
        rank = Rank(self.rank, self.world_size, master_addr, master_port)
        self._learner = open_backend(
            self.config, self.model_path, rank, seed=self.seed, base=self.base
        )
        return {"parameters": self._learner.num_parameters, "pid": os.getpid()}

    def version(self) -> int:
        """The weight version that this rank holds."""
        return self._ready().version

    # --- a step --------------------------------------------------------------------------------

    def prepare(self, store: LightningStore, batch: TrainBatch) -> list[ray.ObjectRef]:
        """On rank 0: the batch laid out; one ref per rank, which live as long as this process and the caller's hold on them."""
        from dataclasses import replace

        from agl_ray.learner.prepare import lay_out
        from agl_ray.trajectory.credit import Credit

        learner = self._ready()
        started = time.perf_counter()
        spans = asyncio.run(_read(store, batch, self.config.learner.step_timeout_seconds))
        read = time.perf_counter() - started
        payloads = lay_out(
            spans,
            batch,
            learner.algorithm,
            self.config.learner,
            world_size=self.world_size,
            seed=self.seed,
            trajectory=self.config.trajectory,
            credit=Credit(self.config.credit, self.base),
            kept=learner.kept,
            score=self._score,
        )
        return [
            ray.put(replace(payload, stats={**payload.stats, "seconds_read": read}))
            for payload in payloads
        ]

    def _score(self, rows: Rows) -> Scores:
        if self._teacher is None:
            raise RunError("scoring of rows: expected algorithm.teacher, got none")
        return asyncio.run(self._teacher.score(rows))

    def train(self, payload: Payload | ray.ObjectRef) -> dict[str, float]:
        """One training step on this rank's payload; the metrics of learner/step.py."""
        if isinstance(payload, ray.ObjectRef):
            payload = waits.get(
                payload,
                on=f"the rows of learner rank {self.rank}",
                seconds=self.config.learner.step_timeout_seconds,
            )
        with self._turn, self._peers(f"training step {payload.step}"):
            return self._ready().train(payload)

    def count_retokenized(self, store: LightningStore, attempts: list[tuple[str, str]]) -> int:
        """On rank 0: re-derived tokens (contract 4) in the calls of these attempts. Here, since the controller reads no spans."""
        from agl_ray.trajectory.calls import retokenized_tokens

        read = waits.wait(
            store.read_spans(attempts),
            on=f"the store's spans of {len(attempts)} attempts",
            seconds=self.config.learner.step_timeout_seconds,
        )
        return retokenized_tokens(asyncio.run(read))

    # --- state ---------------------------------------------------------------------------------

    def save(self, path: str) -> None:
        """Write the checkpoint folder `path`."""
        with self._turn, self._peers("saving a checkpoint"):
            self._ready().save(path)

    def load(self, path: str) -> int:
        """Go to the state of the checkpoint `path`; returns its weight version."""
        with self._turn, self._peers("loading a checkpoint"):
            self._ready().load(path)
            return self._ready().version

    def export(self, path: str) -> None:
        """Write the Hugging Face folder `path`."""
        with self._turn, self._peers("exporting the model"):
            self._ready().export(path)

    # --- weights -------------------------------------------------------------------------------

    def stage_weights(self, version: int) -> dict[str, Any]:
        """Gather the weights, which must be of `version`; rank 0 keeps them for sending and returns their manifest, others return {}."""
        learner = self._ready()
        if version != learner.version:
            raise RunError(
                f"staging of weights: expected version {version}, but learner rank {self.rank} holds version {learner.version}"
            )
        with self._turn, self._peers("gathering the weights"):
            tensors = learner.full_state()
        if self.rank != 0:
            return {}
        from agl_ray.weights.sender import WeightSender

        bucket_bytes = int(self.config.weights.bucket_mib * 2**20)
        self._sender = WeightSender(tensors, version, bucket_bytes)
        return self._sender.manifest()

    def send_weights(self, order: dict[str, Any]) -> dict[str, Any]:
        """On rank 0: send the staged weights as `order` (of WeightSync) says."""
        if self._sender is None:
            raise RunError(
                "sending of weights: expected staged weights, got none; call stage_weights first"
            )
        return self._sender.send(order)

    @contextmanager
    def _peers(self, doing: str) -> Iterator[None]:
        """A collective that another rank did not finish is PeerLost; anything else stays what it is."""
        import torch.distributed as dist

        try:
            yield
        except dist.DistError as error:
            raise self._lost(doing, error) from error
        except RuntimeError as error:  # Gloo has no type of its own for a closed connection
            if self.world_size > 1 and "gloo" in str(error):
                raise self._lost(doing, error) from error
            raise

    def _lost(self, doing: str, error: BaseException) -> PeerLost:
        cause = str(error).splitlines()[0]
        return PeerLost(f"learner rank {self.rank} lost another rank while {doing}: {cause}")

    def _ready(self) -> Backend:
        if self._learner is None:
            raise RunError(f"learner rank {self.rank}: expected setup to be called first")
        return self._learner
