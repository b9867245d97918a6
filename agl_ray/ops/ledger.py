"""The books of a run: where it stands, what it cost, what happened. JSON in the store, so that a resumed run keeps counting.

Written by the controller after each step; read by the summary. `types.to_json(ledger)` and `types.from_json(body, Ledger)`.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec

from agl_ray.types import Record


class RowResult(Record, frozen=True):
    """How one row of a validation ended: its reward, or the end reason of the attempt that has none."""

    rollout_id: str
    attempt_id: str | None
    reward: float | None
    end_reason: str


class Evaluation(Record, frozen=True):
    """The results of a validation after `step` steps, in row order. A failure is no zero: it has no reward at all."""

    step: int
    results: list[RowResult]

    @property
    def scores(self) -> list[float]:
        """Rewards of the `ok` attempts."""
        return [result.reward for result in self.results if result.reward is not None]

    @property
    def failures(self) -> dict[str, int]:
        """Counts of the other rows by end reason."""
        return dict(Counter(r.end_reason for r in self.results if r.reward is None))


PROCESSES = ("runner", "learner", "engine", "gateway", "store", "weight_sync", "controller")


class Ledger(msgspec.Struct, kw_only=True):
    """Counts of a run up to `step` finished steps, over all its sittings. `seconds` by phase; `total_seconds` is wall time
    up to the last entry; `notices` are sentences for people; `restarts` says how often each of PROCESSES was replaced."""

    step: int = 0
    next_row: int = 0
    open_rows: tuple[int, ...] = ()
    dropped_groups: int = 0
    refilled_groups: int = 0
    before: Evaluation | None = None
    after: Evaluation | None = None
    seconds: dict[str, float] = {}
    total_seconds: float = 0.0
    notices: list[str] = []
    max_logprob_diff: float | None = None
    retokenized_tokens: int = 0
    trained_tokens: int = 0
    weight_versions: int = 1
    restarts: dict[str, int] = {}

    def note(self, text: str, restarted: str | None = None) -> None:
        """A sentence for the summary; `restarted` counts one more death of that kind of process."""
        self.notices.append(text)
        if restarted is not None:
            self.restarts[restarted] = self.restarts.get(restarted, 0) + 1

    def book(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def take(self, metrics: dict[str, Any], step: int) -> None:
        """Add a finished step's metrics; the step's weight version exists now."""
        self.step = step
        self.weight_versions = step + 1
        compared = (self.max_logprob_diff, metrics.get("max_logprob_diff"))
        self.max_logprob_diff = max((x for x in compared if x is not None), default=None)
        self.retokenized_tokens += int(metrics.get("retokenized_tokens", 0))
        self.trained_tokens += int(metrics.get("tokens_trained", 0))
        self.refilled_groups += int(metrics.get("groups_refilled", 0))
