"""RunMetrics: what the controller measures, to metrics.jsonl, validation.jsonl and the writers of `logging.writers`.

A helper inside the controller, on its event loop; the writers' threads are `agl_ray.ops.writers`. Test alone: tests/unit/test_run_metrics.py.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from actors.run_events import RunEvents
from agl_ray.config import RunConfig
from agl_ray.config.load import resolved_json
from agl_ray.ops.events import Notice, Validation
from agl_ray.ops.ledger import Evaluation, Ledger
from agl_ray.ops.metrics import tokens_per_second, valid_groups
from agl_ray.ops.summary import confidence_interval
from agl_ray.ops.writer_choice import make_writers
from agl_ray.ops.writers import MetricsBoard
from agl_ray.trajectory.batch import TrainBatch
from agl_ray.waits import wait

CLOSE = 60.0  # seconds that the writers get to send what is left
STOP = 2.0  # after an error or an interruption
PHASES = ("rollout", "update", "sync", "validation", "checkpoint")


class RunMetrics:
    """said: where notices and validations are told. writer_keys: of the driver's environment, for W&B and MLflow."""

    def __init__(
        self, config: RunConfig, folder: Path, said: RunEvents, writer_keys: dict[str, str]
    ) -> None:
        resolved = json.loads(resolved_json(config))
        writers = make_writers(config.logging, folder, resolved, writer_keys)
        self._said = said
        self._board = MetricsBoard(folder, writers, self._from_thread)
        self._loop: asyncio.AbstractEventLoop | None = None

    def begin(self, step: int) -> None:
        """Drop what is after `step`, the run's position, and start the writers; called on the loop that tells."""
        self._loop = asyncio.get_running_loop()
        self._board.begin(step)

    def _from_thread(self, text: str) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._said.tell_soon, Notice(text=text))

    async def validated(self, evaluation: Evaluation) -> None:
        """A validation with at least one score: its row, and its line for the person."""
        mean, (low, high) = confidence_interval(evaluation.scores)
        row = {
            "step": evaluation.step,
            "reward": mean,
            "reward_low": low,
            "reward_high": high,
            "rollouts": len(evaluation.scores),
            "failures": evaluation.failures,
        }
        self._board.validated(row)
        n = len(evaluation.scores)
        await self._said.tell(
            Validation(step=evaluation.step, accuracy=mean, ci95=(low, high), n=n)
        )

    def step(
        self,
        batch: TrainBatch,
        metrics: dict[str, Any],
        sync: dict[str, Any],
        ledger: Ledger,
        before: dict[str, float],
        failures: dict[str, int],
        validation: Evaluation | None,
    ) -> dict[str, Any]:
        """Write the row of a training step and return it. metrics: of the learner. sync: what the weight update told. before: the ledger's
        seconds at the step's begin. failures: attempts that did not end ok since the last step, by reason."""
        row: dict[str, Any] = {
            **batch.metrics,
            "dropped_groups": ledger.dropped_groups,
            **{key: value for key, value in metrics.items() if isinstance(value, int | float)},
            "sync_ms": 1000 * float(sync.get("seconds", 0.0)),
            "pause_ms": 1000 * float(sync.get("pause_seconds", 0.0)),
            "weight_version": batch.step,
            "failures": failures,
        }
        for name in PHASES:
            row[f"seconds_{name}"] = ledger.seconds.get(name, 0.0) - before.get(name, 0.0)
        row["valid_groups"] = valid_groups(row)
        row["tokens_per_second"] = tokens_per_second(row)
        row["writer_failures"] = self._board.failures
        if validation is not None:
            row["validation"] = sum(validation.scores) / len(validation.scores)
        self._board.write(row)
        return row

    async def close(self, ok: bool) -> None:
        """Let the writers send what is left. A second call does nothing."""
        seconds = CLOSE if ok else STOP
        closing = asyncio.to_thread(self._board.close, ok, seconds)
        await wait(closing, on="the metrics writers to close", seconds=seconds + CLOSE)
