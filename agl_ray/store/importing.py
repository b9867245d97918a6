"""An export back into a store: the same ids, order and spans.

What it is: `import_store(folder, url, settings)`, for journals that hold nothing yet. Records go in as they came out; a rollout that
was running goes in as running, and its attempts end by their leases, as after any restart. The batches that spans came in are
the same too, so that a repeated `add_spans` is still recognised.
Who calls it: `agl_ray.cli.store`. Test alone: tests/unit/test_store_export.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from agl_ray.spans import SPAN_SCHEMA
from agl_ray.store.export import FORMAT, MANIFEST, SCHEMAS
from agl_ray.store.journals.base import AttemptKey, Journal, Row, SpanRow
from agl_ray.store.journals.marks import is_empty, open_checked
from agl_ray.store.journals.opening import open_journal
from agl_ray.store.journals.settings import JournalSettings
from agl_ray.store.payload import SEQUENCE, pack
from agl_ray.store.rows import row_of
from agl_ray.store.tables import ATTEMPTS, RESOURCES, ROLLOUTS, WORKERS, RecordTable
from agl_ray.types import InputError, StoreError

RECORDS = 2000  # rows read at once
SPAN_ROWS = 512
SPAN_BYTES = 16 * 2**20  # payloads of one transaction (one batch at least)


async def import_store(
    folder: Path, url: str, settings: JournalSettings | None = None
) -> dict[str, int]:
    """Write the export in `folder` into the empty journal at `url`; rows by kind.

    InputError: no whole export, columns that do not fit, a store that cannot be opened or holds something. After an error half-way the store holds a part:
    remove it before trying again."""
    expected = read_manifest(folder)["rows"]
    journal = open_journal(url, settings)
    try:
        live = await open_checked(journal)
    except StoreError as error:
        raise InputError(str(error)) from error
    try:
        if not await is_empty(journal, live):
            raise InputError(
                f"store {url}: it is not empty ({live.rollouts_by_status}); import into a new store"
            )
        rows = {"spans": await _spans(journal, folder)}
        for name in ("state", "workers", "resources", "attempts", "rollouts"):
            rows[name] = await _records(journal, folder, name)
    finally:
        await journal.close()
    for name, number in expected.items():
        if rows[name] != number:
            raise InputError(
                f"export {folder}: {name}.parquet has {rows[name]} rows and {MANIFEST} says {number}; is it of another export?"
            )
    return rows


def read_manifest(folder: Path) -> dict[str, Any]:
    """InputError where the folder holds no whole export that this version understands."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        found = manifest["format"]
        missing = [name for name in SCHEMAS if not (folder / f"{name}.parquet").is_file()]
    except FileNotFoundError as error:
        raise InputError(
            f"export {folder}: there is no {MANIFEST}; expected a folder that `agl-ray store export` finished"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"export {path}: it cannot be read: {error!r}") from error
    if found != FORMAT:
        raise InputError(f"export {folder}: its format is {found}, this agl_ray reads {FORMAT}")
    if missing:
        raise InputError(f"export {folder}: {missing[0]}.parquet is missing")
    checked: dict[str, Any] = manifest
    return checked


def _batches(folder: Path, name: str, size: int) -> Iterator[pa.RecordBatch]:
    path = folder / f"{name}.parquet"
    try:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=size)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"export {path}: it cannot be read: {error}") from error


async def _records(journal: Journal, folder: Path, name: str) -> int:
    number = 0
    for batch in _batches(folder, name, RECORDS):
        try:
            rows = list(_rows(name, batch, number))
        except InputError as error:
            raise InputError(f"export {folder / name}.parquet: {error}") from error
        await journal.write(rows, [])
        number += len(rows)
    return number


def _rows(name: str, batch: pa.RecordBatch, before: int) -> Iterator[Row]:
    """`before`: rows of this file already done; it stands in for ordinals that are not there."""
    if name == "state":
        for one in batch.to_pylist():
            yield row_of("state", one["key"], 0, one["value"])
        return
    table: RecordTable = {
        "rollouts": ROLLOUTS,
        "attempts": ATTEMPTS,
        "resources": RESOURCES,
        "workers": WORKERS,
    }[name]
    for place, (record, *extra) in enumerate(table.records(batch), start=before + 1):
        if name == "rollouts":
            created, position = extra
            waiting = (position or place) if record.status.waiting else 0
            yield row_of("rollout", record.rollout_id, waiting, record, created or place)
        elif name == "attempts":
            key = f"{record.rollout_id}/{record.attempt_id}"
            yield row_of("attempt", key, record.sequence_id, record)
        elif name == "resources":
            yield row_of("resources", record.resources_id, extra[0] or place, record)
        else:
            yield row_of("worker", record.worker_id, 0, record)


class _Piece(NamedTuple):
    """Rows of one batch of spans whose sequence ids follow one another."""

    key: AttemptKey
    batch_id: str | None
    first: int
    rows: pa.Table

    def goes_on(self, before: list[_Piece]) -> bool:
        """Whether it belongs to the same batch as the pieces `before` it."""
        last = before[-1]
        return self[:2] == last[:2] and self.first == last.first + last.rows.num_rows


async def _spans(journal: Journal, folder: Path) -> int:
    """Spans in the batches they came in; a batch may go on in the next piece of the file."""
    number = size = 0
    waiting: list[SpanRow] = []
    held: list[_Piece] = []
    for batch in _batches(folder, "spans", SPAN_ROWS):
        number += batch.num_rows
        for piece in _pieces(folder, batch):
            if held and not piece.goes_on(held):
                waiting.append(_span_row(held))
                size += len(waiting[-1].payload)
                held = []
            if size > SPAN_BYTES:
                await journal.write([], waiting)
                waiting, size = [], 0
            held.append(piece)
    if held:
        waiting.append(_span_row(held))
        await journal.write([], waiting)
    return number


def _pieces(folder: Path, batch: pa.RecordBatch) -> Iterator[_Piece]:
    table = pa.Table.from_batches([batch])
    missing = [name for name in SPAN_SCHEMA.names if name not in table.schema.names]
    if missing:
        raise InputError(f"export {folder}/spans.parquet: column {missing[0]!r} is missing")
    try:
        spans = table.select(SPAN_SCHEMA.names).cast(SPAN_SCHEMA)
    except (pa.ArrowException, ValueError) as error:
        raise InputError(f"export {folder}/spans.parquet: {error}") from error
    columns = [spans.column(name).to_pylist() for name in ("rollout_id", "attempt_id")]
    given = "batch_id" in table.schema.names
    columns.append(table.column("batch_id").to_pylist() if given else [None] * table.num_rows)
    keys = list(zip(*columns, strict=True))
    sequence = spans.column("sequence_id").to_pylist()
    if None in sequence:
        raise InputError(f"export {folder}/spans.parquet: expected a sequence_id in every row")
    begin = 0
    for i in range(1, len(keys) + 1):
        if i == len(keys) or keys[i] != keys[begin] or sequence[i] != sequence[i - 1] + 1:
            rollout_id, attempt_id, batch_id = keys[begin]
            rows = spans.slice(begin, i - begin)
            yield _Piece((rollout_id, attempt_id), batch_id, sequence[begin], rows)
            begin = i


def _span_row(pieces: list[_Piece]) -> SpanRow:
    """One batch for the journal. Without an id of its own it is named by its place."""
    rows = pa.concat_tables([piece.rows for piece in pieces])
    empty = pa.nulls(rows.num_rows, SPAN_SCHEMA.field(SEQUENCE).type)  # the store's to give
    rows = rows.set_column(SEQUENCE, SPAN_SCHEMA.field(SEQUENCE), empty).combine_chunks()
    first = pieces[0]
    payload, number = pack(rows.to_batches()[0], first.key)
    return SpanRow(
        first.batch_id or f"import-{first.first}", first.key, first.first, number, payload
    )
