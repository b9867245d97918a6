"""A store's records as Parquet: a file per kind, readable by pandas, polars, DuckDB and Spark without us.

What it is: `export_store(archive, folder)` writes

    rollouts.parquet  attempts.parquet  resources.parquet  workers.parquet  state.parquet    records, see `agl_ray.store.tables`
    spans.parquet     SPAN_SCHEMA, token ids as lists; in order of (creation of the rollout, attempt, sequence)
    manifest.json     what, whence, how many rows; written last, so a folder without it is a broken export

Everything streams: memory is bounded by a row group (and the largest attempt), not by the store. Encrypted journals come out in plain text.
Who calls it: `agl_ray.cli.store`; `agl_ray.store.importing` reads it back. Test alone: tests/unit/test_store_export.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from agl_ray.store.archive import Archive
from agl_ray.store.payload import SCHEMA_PRINT
from agl_ray.store.tables import ATTEMPTS, RESOURCES, ROLLOUTS, SPANS, STATE, WORKERS
from agl_ray.types import InputError

FORMAT = 1
MANIFEST = "manifest.json"
SCHEMAS: dict[str, pa.Schema] = {
    "rollouts": ROLLOUTS.schema,
    "attempts": ATTEMPTS.schema,
    "spans": SPANS,
    "resources": RESOURCES.schema,
    "workers": WORKERS.schema,
    "state": STATE,
}
GROUP_BYTES = 32 * 2**20  # of a row group, in memory
GROUP_ROWS = 100_000
# Text that repeats is stored once per row group; token ids and log-probabilities do not repeat.
REPEATING = [
    *("rollout_id", "attempt_id", "trace_id", "parent_id", "name", "kind", "status", "role"),
    *("model", "dialect", "finish_reason", "reward_dimension", "mode", "resources_id"),
    *("config", "end_reason", "worker_id", "batch_id", "metadata", "input"),
]

Progress = Callable[[int], None]


class Dataset:
    """One Parquet file under way: it appears under its name when it is whole."""

    def __init__(self, folder: Path, name: str) -> None:
        self.num_rows = 0
        self._path = folder / f"{name}.parquet"
        self._partial = folder / f".{name}.parquet.partial"
        self._schema = SCHEMAS[name]
        self._waiting: list[pa.Table] = []
        self._bytes = self._rows = 0
        self._writer = pq.ParquetWriter(
            self._partial,
            self._schema,
            compression="zstd",
            use_dictionary=[one for one in REPEATING if one in self._schema.names],
        )

    def add(self, table: pa.Table) -> None:
        self._waiting.append(table)
        self._bytes += table.nbytes
        self._rows += table.num_rows
        if self._bytes >= GROUP_BYTES or self._rows >= GROUP_ROWS:
            self._write()

    def _write(self) -> None:
        if self._rows:
            table = pa.concat_tables(self._waiting)
            self._writer.write_table(table, row_group_size=self._rows)
        self.num_rows += self._rows
        self._waiting, self._bytes, self._rows = [], 0, 0

    def __enter__(self) -> Dataset:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self._write()
        self._writer.close()
        if error is None:
            self._partial.rename(self._path)
        else:
            self._partial.unlink(missing_ok=True)


async def export_store(
    archive: Archive, folder: Path, source: str, progress: Progress | None = None
) -> dict[str, int]:
    """Write the whole store into `folder` (made; it must be empty); rows by kind.

    source: what the manifest says it came from. progress: called with the number of rollouts done. InputError where the folder holds
    something or cannot be written."""
    _claim(folder)
    with (
        Dataset(folder, "rollouts") as rollouts,
        Dataset(folder, "attempts") as attempts,
        Dataset(folder, "spans") as spans,
    ):
        done = 0
        async for page in archive.rollouts():
            rollouts.add(ROLLOUTS.table(page))
            ids = [one.rollout.rollout_id for one in page]
            attempts.add(ATTEMPTS.table((one,) for one in await archive.attempts(ids)))
            async for table in archive.spans(await archive.span_totals(ids)):
                spans.add(table)
            done += len(page)
            if progress is not None:
                progress(done)
    rows = {"rollouts": rollouts.num_rows, "attempts": attempts.num_rows, "spans": spans.num_rows}
    rows |= await _rest(archive, folder)
    _write_manifest(folder, source, rows)
    return rows


async def _rest(archive: Archive, folder: Path) -> dict[str, int]:
    with (
        Dataset(folder, "resources") as resources,
        Dataset(folder, "workers") as workers,
        Dataset(folder, "state") as state,
    ):
        async for updates in archive.resources():
            resources.add(RESOURCES.table(updates))
        workers.add(WORKERS.table((one,) for one in await archive.workers()))
        async for values in archive.values():
            keys, bodies = zip(*values, strict=True)
            state.add(pa.table({"key": keys, "value": bodies}, schema=STATE))
    return {
        "resources": resources.num_rows,
        "workers": workers.num_rows,
        "state": state.num_rows,
    }


def _claim(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InputError(f"--out {folder}: it is not empty; give a folder that is new or empty")
    except OSError as error:
        raise InputError(
            f"--out {folder}: it cannot be made or read ({error.strerror or error})"
        ) from error


def _write_manifest(folder: Path, source: str, rows: dict[str, int]) -> None:
    import agl_ray

    manifest: dict[str, Any] = {
        "format": FORMAT,
        "agl_ray": agl_ray.__version__,
        "source": source,
        "exported": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "span_schema": SCHEMA_PRINT,
        "rows": rows,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
