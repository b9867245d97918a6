"""Spans given one by one, as the batches that the store takes.

What it is: rows of one attempt whose numbers follow each other (or are the store's to give) become a `Run`, which travels as one payload and
names its spans. Order is kept; a row that repeats the id of an earlier one is left out.
Who calls it: `agl_ray.store.span_calls`. Test alone: tests/store_catalogue/spans.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from agl_ray.spans import span_batch
from agl_ray.store.checks import check_id, check_sequence
from agl_ray.store.journals.base import AttemptKey
from agl_ray.store.numbers import BETWEEN_IDS
from agl_ray.store.payload import pack
from agl_ray.store.spans import SpanItem
from agl_ray.types import InputError
from agl_ray.types.errors import KnownSpans

Rows = Sequence[Mapping[str, Any]]
MOST_SPANS = 64  # of a run
MOST_TEXT = 1024  # characters of their ids: together they are a key of the journal


class Run(NamedTuple):
    """places: which rows, all of attempt `key`. first: the number of the first where it was chosen; the others follow."""

    key: AttemptKey
    first: int | None
    places: list[int]

    def item(self, rows: Rows) -> SpanItem:
        """For the store. InputError where a row does not fit into SPAN_SCHEMA."""
        chosen = [rows[place] for place in self.places]
        try:
            batch = span_batch([{**row, "sequence_id": None} for row in chosen])
        except (TypeError, ValueError, OverflowError, pa.ArrowException) as error:
            names = ", ".join(str(row["span_id"]) for row in chosen)
            raise InputError(
                f"span {names}: attributes or a column cannot be written: {error}"
            ) from error
        payload, number = pack(batch, self.key)
        batch_id = BETWEEN_IDS.join(row["span_id"] for row in chosen)
        return SpanItem(*self.key, batch_id, number, payload, self.first, by_id=True)

    def without(self, known: KnownSpans, rows: Rows) -> list[Run]:
        """The runs of the rows that the store has not."""
        ids = set(known.ids.split(BETWEEN_IDS))
        return runs_of(rows, [place for place in self.places if rows[place]["span_id"] not in ids])


def runs_of(rows: Rows, places: Sequence[int] | None = None) -> list[Run]:
    """The rows at `places` (None: all) as runs. InputError names a wrong id or number."""
    runs: list[Run] = []
    open_runs: dict[AttemptKey, Run] = {}
    texts: dict[AttemptKey, int] = {}
    seen: set[tuple[AttemptKey, str]] = set()
    for place in range(len(rows)) if places is None else places:
        row = rows[place]
        key, span_id, number = _checked(row)
        if (key, span_id) in seen:
            continue
        seen.add((key, span_id))
        run = open_runs.get(key)
        text = texts.get(key, 0) + len(span_id) + 1
        if run is None or not _follows(run, number) or text > MOST_TEXT:
            run = open_runs[key] = Run(key, number, [])
            runs.append(run)
            text = len(span_id) + 1
        run.places.append(place)
        texts[key] = text
    return runs


def _follows(run: Run, number: int | None) -> bool:
    if len(run.places) >= MOST_SPANS:
        return False
    return number == (None if run.first is None else run.first + len(run.places))


def _checked(row: Mapping[str, Any]) -> tuple[AttemptKey, str, int | None]:
    span_id, number = row["span_id"], row.get("sequence_id")
    check_id("span_id", span_id)
    if number is not None:
        check_sequence(number)
    return (row["rollout_id"], row["attempt_id"]), span_id, number
