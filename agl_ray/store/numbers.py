"""The numbers of spans: which places in its rollout a batch gets, and which spans came before.

What it is: the span commands of the state machine, under the same rules as the rest of it (`agl_ray.store.machine`).
Who calls it: `agl_ray.store.machine.Machine` inherits it, `agl_ray.store.spans` calls it. Test alone: tests/unit/test_store_machine.py,
tests/store_catalogue/spans.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from agl_ray.store import lifecycle
from agl_ray.store.checks import check_sequence
from agl_ray.store.journals.base import AttemptKey, BatchEntry
from agl_ray.store.state import State
from agl_ray.types import replace

BETWEEN_IDS = ","
"""Joins the ids of the spans of a batch to its `batch_id`, where a batch names its spans."""


class SpanNumbers:
    """Of a `Machine`, whose state and lease these are."""

    state: State
    lease_seconds: float

    def known_batch(self, key: AttemptKey, batch_id: str) -> BatchEntry | None:
        """Where a batch of an open attempt was put before, if it was."""
        return self.state.batches.get(key, {}).get(batch_id)

    def known_spans(self, key: AttemptKey, span_ids: Sequence[str]) -> list[str]:
        """Those spans of an open attempt that came before, in batches that name their spans."""
        batches = self.state.batches.get(key, {})
        return [one for one in span_ids if one in batches]

    def add_spans(
        self,
        key: AttemptKey,
        batch_id: str,
        count: int,
        size: int,
        now: float,
        *,
        first: int | None = None,
        by_id: bool = False,
    ) -> BatchEntry:
        """Number `count` new spans of an attempt and renew its lease.

        `size` is the payload's bytes. Its rollout's numbers go on, or start at `first` and are pushed up by it. by_id: `batch_id` names
        the spans. The caller has asked `known_batch` or `known_spans` (for a final attempt: the journal) first.
        """
        attempt = self.state.attempt(*key)
        if first is not None:
            check_sequence(first)
        entry = self.state.put_batch(key, batch_id, count, size, first)
        if by_id:
            self.name_spans(key, batch_id, entry)
        lifecycle.show_life(self.state, attempt, self.lease_seconds, now, spans=count)
        return entry

    def name_spans(self, key: AttemptKey, batch_id: str, entry: BatchEntry) -> None:
        """Note each span of a batch that names several, while its attempt is open."""
        batches = self.state.batches.get(key)
        if batches is not None and BETWEEN_IDS in batch_id:
            for place, span_id in enumerate(batch_id.split(BETWEEN_IDS)):
                batches[span_id] = BatchEntry(entry.first + place, 1)

    def next_sequence_ids(self, keys: Sequence[AttemptKey], now: float) -> list[int]:
        """One number for each, of the attempt's rollout; no later span gets it unless it asks for it. Journalled, so that it
        stays so after a restart."""
        del now
        for key in keys:
            self.state.attempt(*key)
        numbers = []
        for rollout_id, _ in keys:
            tally = self.state.tallies[rollout_id]
            tally.last_sequence += 1
            numbers.append(tally.last_sequence)
        for rollout_id in dict.fromkeys(key[0] for key in keys):
            last = self.state.tallies[rollout_id].last_sequence
            self.state.put_rollout(replace(self.state.rollouts[rollout_id], reserved_spans=last))
        return numbers
