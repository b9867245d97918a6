"""The journal that keeps nothing beyond its process: for tests and for trying things out.

Who calls it: `agl_ray.store.journal.open_journal("memory://")`. Test alone: tests/unit/test_store_journal.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from agl_ray.store.journal import Row, SpanRow
from agl_ray.store.state import AttemptKey, BatchEntry, Snapshot

log = logging.getLogger("agl_ray.store")


class MemoryJournal:
    """Holds span payloads in dictionaries; records are in the state machine already and are dropped here."""

    durable = False

    def __init__(self) -> None:
        self._spans: dict[AttemptKey, list[SpanRow]] = {}

    def load(self) -> Snapshot:
        log.warning(
            "store journal memory://: NOTHING IS KEPT. If this process ends, every rollout, span and reward is gone; "
            "use sqlite:///path for a run that matters"
        )
        return Snapshot()

    def write(self, rows: Sequence[Row], spans: Sequence[SpanRow]) -> None:
        del rows
        for span in spans:
            self._spans.setdefault(span.key, []).append(span)

    def payloads(self, keys: Sequence[AttemptKey]) -> list[SpanRow]:
        return [span for key in keys for span in self._spans.get(key, ())]

    def find_batch(self, key: AttemptKey, batch_id: str) -> BatchEntry | None:
        for span in self._spans.get(key, ()):
            if span.batch_id == batch_id:
                return BatchEntry(span.first, span.number)
        return None

    def close(self) -> None:
        """Nothing to flush."""
