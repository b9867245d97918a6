"""The books of a run: where it stands, what it cost, what happened. JSON in the store, so that a resumed run keeps counting.

Written by the controller after each step; read by the summary. `types.to_json(ledger)` and `types.from_json(body, Ledger)`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from agl_ray.types import Record


class Evaluation(Record, frozen=True):
    """Rewards of the `ok` attempts of a validation, in row order; `failures` counts the others by end reason.

    `attempts` are the (rollout_id, attempt_id) of the same attempts, for reading their conversations.
    """

    step: int
    rewards: list[float]
    failures: dict[str, int]
    attempts: list[tuple[str, str]]


class Ledger(msgspec.Struct, kw_only=True):
    """Counts of a run up to `step` finished steps. `seconds` by phase; `notices` are sentences for people."""

    step: int = 0
    next_row: int = 0
    dropped_groups: int = 0
    before: Evaluation | None = None
    after: Evaluation | None = None
    seconds: dict[str, float] = {}
    notices: list[str] = []
    max_logprob_diff: float = 0.0
    retokenized_tokens: int = 0
    trained_tokens: int = 0
    weight_versions: int = 1
    learner_restarts: int = 0
    runner_restarts: int = 0
    engine_restarts: int = 0

    def book(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def take(self, metrics: dict[str, Any], step: int) -> None:
        """Add a finished step's metrics; the step's weight version exists now."""
        self.step = step
        self.weight_versions = step + 1
        self.max_logprob_diff = max(
            self.max_logprob_diff, float(metrics.get("max_logprob_diff", 0.0))
        )
        self.retokenized_tokens += int(metrics.get("retokenized_tokens", 0))
        self.trained_tokens += int(metrics.get("tokens", 0))
