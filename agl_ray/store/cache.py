"""The newest span payloads in memory, so that a training step reads them without the journal.

What it is: whole attempts or nothing (a part of an attempt is of no use to a reader), least recently used out first.
Who calls it: `agl_ray.store.core`. Test alone: tests/unit/test_store_cache.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from agl_ray.store.journals.base import AttemptKey, SpanRow


class PayloadCache:
    """`max_bytes` bounds the payload bytes held."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.size = 0
        self._rows: OrderedDict[AttemptKey, list[SpanRow]] = OrderedDict()

    def append(self, row: SpanRow, num_before: int) -> None:
        """A new batch. It is kept where all earlier ones of its attempt are (`num_before` spans)."""
        if row.key in self._rows:
            self._rows[row.key].append(row)
            self._rows.move_to_end(row.key)
        elif num_before == 0:
            self._rows[row.key] = [row]
        else:
            return
        self.size += len(row.payload)
        self._shrink()

    def fill(self, key: AttemptKey, rows: Sequence[SpanRow]) -> None:
        """An attempt read back from the journal, complete."""
        self._drop(key)
        self._rows[key] = list(rows)
        self.size += sum(len(row.payload) for row in rows)
        self._shrink()

    def drop(self, keys: Iterable[AttemptKey]) -> None:
        for key in keys:
            self._drop(key)

    def get(self, key: AttemptKey) -> list[SpanRow] | None:
        """All batches of the attempt in order, or None where they are not held."""
        rows = self._rows.get(key)
        if rows is None:
            return None
        self._rows.move_to_end(key)
        return list(rows)

    def _drop(self, key: AttemptKey) -> None:
        self.size -= sum(len(row.payload) for row in self._rows.pop(key, ()))

    def _shrink(self) -> None:
        while self.size > self.max_bytes and self._rows:
            self._drop(next(iter(self._rows)))
