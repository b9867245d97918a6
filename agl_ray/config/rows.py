"""The rows of a data set: a .jsonl or .parquet file, or a function that returns them.

Called by the trainer and `agl-ray check`; whatever is wrong is an InputError that names file, row and field, before
anything starts. Test alone: tests/unit/test_config_rows.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from agl_ray.config.imports import load_object, one_line
from agl_ray.config.paths import close_names, find, looked_in
from agl_ray.types.errors import InputError

Row = dict[str, Any]


def load_rows(spec: str, seed: int, fields: Sequence[str], base: Path) -> list[Row]:
    """The rows that `spec` names; each is a dictionary of JSON values and has every field of `fields`.

    `spec`: a path ending in .jsonl or .parquet (from the current directory, then from `base`), or `file.py:function` /
    `module:function`, which is called with `seed=seed`. Raises InputError: file missing, a line that is no JSON, a row
    without a field, no rows at all.
    """
    suffix = Path(spec).suffix
    if suffix in (".jsonl", ".parquet"):
        path = find(spec, base)
        if path is None:
            raise InputError(f"there is no data file {spec}; {looked_in(spec, base)}")
        rows = _from_jsonl(path, spec) if suffix == ".jsonl" else _from_parquet(path, spec)
    elif ":" in spec:
        rows = _from_function(spec, seed, base)
    else:
        raise InputError(
            f"data {spec!r}: expected a file ending in .jsonl or .parquet, or 'file.py:function'"
        )
    if not rows:
        raise InputError(f"data {spec!r} has no rows; a data set needs at least one")
    unit = "line" if suffix == ".jsonl" else "row"
    for number, row in enumerate(rows, 1):
        _check(row, f"data {spec!r}, {unit} {number}", fields)
    return rows


def _from_jsonl(path: Path, spec: str) -> list[Row]:
    rows: list[Row] = []
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    raise InputError(f"data {spec!r}, line {number} is empty; remove it")
                rows.append(msgspec.json.decode(line))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        start = line[:60].decode("utf-8", "replace").strip()
        raise InputError(
            f"data {spec!r}, line {number} is not JSON ({error}); it begins with {start!r}"
        ) from error
    except OSError as error:
        raise InputError(f"data {spec!r} cannot be read: {error.strerror or error}") from error
    return rows


def _from_parquet(path: Path, spec: str) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[Row] = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"data {spec!r} is not a readable Parquet file: {error}") from error
    return rows


def _from_function(spec: str, seed: int, base: Path) -> list[Row]:
    function = load_object(spec, base)
    if not callable(function):
        raise InputError(f"data {spec!r}: expected a function, got a {type(function).__name__}")
    try:
        made = function(seed=seed)
    except Exception as error:
        raise InputError(
            f"data {spec!r}: calling it with seed={seed} failed: {one_line(error)}"
        ) from error
    if isinstance(made, (str, bytes, dict)) or not isinstance(made, Iterable):
        raise InputError(
            f"data {spec!r}: expected a list of rows (dictionaries), got a {type(made).__name__}"
        )
    return list(made)


def _check(row: Any, where: str, fields: Sequence[str]) -> None:
    """A row is a dictionary, has the fields, and can be written as JSON."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a dictionary (a JSON object), got {_short(row)}")
    for name in fields:
        if name not in row:
            hint = close_names(name, [key for key in row if isinstance(key, str)])
            raise InputError(
                f"{where} has no field {name!r} (data.fields asks for it); "
                f"it has {', '.join(repr(key) for key in row) or 'none'}{hint}"
            )
    try:
        msgspec.json.encode(row)
    except (TypeError, ValueError, OverflowError, msgspec.MsgspecError) as error:
        raise InputError(f"{where} cannot be written as JSON: {error}") from error


def _short(value: Any) -> str:
    words = repr(value)
    return words if len(words) <= 60 else words[:57] + "..."
