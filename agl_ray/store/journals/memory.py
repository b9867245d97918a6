"""The journal that keeps nothing beyond its process: for tests and for trying things out.

Who calls it: `journals.opening.open_journal("memory://")`. Test alone: tests/unit/test_store_journal_contract.py.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from agl_ray.store.journals.answers import answer, getter
from agl_ray.store.journals.base import (
    COLUMNS,
    AttemptKey,
    BatchEntry,
    EventRow,
    Live,
    Page,
    Query,
    Row,
    SpanRow,
    SpanTotals,
)

log = logging.getLogger("agl_ray.store")


class MemoryJournal:
    """Dictionaries. It may be opened again after `close`, as a store that restarts would."""

    durable = False

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, Row]] = {kind: {} for kind in COLUMNS}
        self._attempts: dict[str, list[str]] = {}  # keys of a rollout's attempts
        self._spans: dict[str, dict[str, list[SpanRow]]] = {}  # rollout id, attempt id
        self._events: dict[int, EventRow] = {}
        self._starts = 0

    async def open(self, *, must_exist: bool = False) -> Live:
        log.warning(
            "store journal memory://: NOTHING IS KEPT. If this process ends, every rollout, span and reward is gone; "
            "use sqlite:///path for a run that matters"
        )
        del must_exist  # it cannot know whether it once held anything
        self._starts += 1
        rollouts, attempts = self._rows["rollout"].values(), self._rows["attempt"].values()
        resources = self._rows["resources"].values()
        status, created = getter("rollout", "status"), getter("rollout", "created")
        mode, reason = getter("rollout", "mode"), getter("attempt", "end_reason")
        spans = [span for of in self._spans.values() for many in of.values() for span in many]
        open_attempts = sorted(row for row in attempts if reason(row) is None)
        is_open = {(row.columns[0], row.columns[1]) for row in open_attempts}
        return Live(
            starts=self._starts,
            waiting=sorted(
                ((row.key, row.position) for row in rollouts if row.position),
                key=lambda place: place[1],
            ),
            open_attempts=open_attempts,
            open_batches=[
                (span.batch_id, span.key, BatchEntry(span.first, span.number))
                for span in spans
                if span.key in is_open
            ],
            workers=list(self._rows["worker"].values()),
            latest_resources=max(resources, key=lambda row: row.position, default=None),
            rollouts_by_status=dict(Counter(status(row) for row in rollouts)),
            rollouts_by_mode=dict(Counter((status(row), mode(row)) for row in rollouts)),
            attempts_by_reason=dict(Counter(reason(row) or "" for row in attempts)),
            num_resources=len(resources),
            num_spans=sum(span.number for span in spans),
            span_bytes=sum(len(span.payload) for span in spans),
            last_created=max((created(row) for row in rollouts), default=0),
            last_position=max((row.position for row in [*rollouts, *resources]), default=0),
            last_event=max(self._events, default=0),
        )

    async def write(
        self, rows: Sequence[Row], spans: Sequence[SpanRow], events: Sequence[EventRow] = ()
    ) -> None:
        for row in rows:
            if row.kind == "attempt" and row.key not in self._rows["attempt"]:
                self._attempts.setdefault(row.columns[0], []).append(row.key)
            self._rows[row.kind][row.key] = row
        for span in spans:
            self._spans.setdefault(span.key[0], {}).setdefault(span.key[1], []).append(span)
        self._events.update((event.number, event) for event in events)

    async def rows(self, kind: str, keys: Sequence[str]) -> list[Row]:
        held = self._rows[kind]
        return [held[key] for key in dict.fromkeys(keys) if key in held]

    async def attempts_of(self, rollout_ids: Sequence[str]) -> list[Row]:
        held = self._rows["attempt"]
        found = [held[key] for one in rollout_ids for key in self._attempts.get(one, ())]
        return sorted(found, key=lambda row: (row.columns[0], row.position))

    async def span_totals(self, rollout_ids: Sequence[str]) -> list[SpanTotals]:
        return [
            SpanTotals(
                (rollout_id, attempt_id),
                sum(span.number for span in spans),
                max(span.first + span.number - 1 for span in spans),
                sum(len(span.payload) for span in spans),
            )
            for rollout_id in rollout_ids
            for attempt_id, spans in self._spans.get(rollout_id, {}).items()
        ]

    async def query(self, query: Query) -> Page:
        return answer(query, self._rows[query.kind].values())

    async def keys(self, kind: str, prefix: str) -> list[str]:
        return sorted(key for key in self._rows[kind] if key.startswith(prefix))

    async def payloads(self, keys: Sequence[AttemptKey]) -> list[SpanRow]:
        return [span for key in keys for span in sorted(self._of(key), key=lambda one: one.first)]

    async def find_batch(self, key: AttemptKey, batch_id: str) -> BatchEntry | None:
        for span in self._of(key):
            if span.batch_id == batch_id:
                return BatchEntry(span.first, span.number)
        return None

    def _of(self, key: AttemptKey) -> Sequence[SpanRow]:
        return self._spans.get(key[0], {}).get(key[1], ())

    async def events(self, after: int, limit: int) -> list[EventRow]:
        return [self._events[number] for number in sorted(self._events) if number > after][:limit]

    async def drop_events(self, up_to: int) -> None:
        self._events = {number: one for number, one in self._events.items() if number > up_to}

    async def forget(self, rollout_ids: Sequence[str]) -> None:
        for rollout_id in rollout_ids:
            self._rows["rollout"].pop(rollout_id, None)
            self._spans.pop(rollout_id, None)
            for key in self._attempts.pop(rollout_id, ()):
                del self._rows["attempt"][key]

    async def close(self) -> None:
        """Nothing to flush."""
