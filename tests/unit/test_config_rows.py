"""Data sets: rows from .jsonl, .parquet and functions; what is wrong is named by file, row and field."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agl_ray.config import load_rows
from agl_ray.types import InputError

ROWS = [{"question": "1+1", "answer": 2}, {"question": "2+3", "answer": 5}]


def refused(spec: str, base: Path, fields: tuple[str, ...] = ("question",)) -> str:
    with pytest.raises(InputError) as caught:
        load_rows(spec, 0, fields, base)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_same_rows_from_every_source(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"question": "1+1", "answer": 2}\n{"question": "2+3", "answer": 5}\n'
    )
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    (tmp_path / "task.py").write_text(f"def rows(seed):\n    return {ROWS!r}[seed:]\n")
    for spec in ("a.jsonl", "a.parquet", "task.py:rows", str(tmp_path / "a.jsonl")):
        assert load_rows(spec, 0, ["question", "answer"], tmp_path) == ROWS
    assert load_rows("task.py:rows", 1, [], tmp_path) == ROWS[1:]


def test_a_row_without_its_field_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "1"}\n{"qestion": "2", "answer": 3}\n')
    message = refused("a.jsonl", tmp_path)
    assert "'a.jsonl', line 2 has no field 'question'" in message
    assert "it has 'qestion', 'answer'; did you mean 'qestion'?" in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "has no rows"),
        ('{"question": 1}\n{"question": \n', "line 2 is not JSON"),
        ('{"question": NaN}\n', "line 1 is not JSON"),
        ("[1, 2]\n", "line 1: expected a dictionary"),
        ('{"question": 1}\n\n{"question": 2}\n', "line 2 is empty"),
    ],
)
def test_bad_lines(tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    assert part in refused("a.jsonl", tmp_path)


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    assert "did you mean 'train.jsonl'" in refused("tran.jsonl", tmp_path)
    assert "(no such folder)" in refused("no/such/train.jsonl", tmp_path)
    (tmp_path / "a.parquet").write_text("this is no Parquet")
    assert "not a readable Parquet file" in refused("a.parquet", tmp_path)
    assert "expected a file ending in .jsonl or .parquet" in refused("data.csv", tmp_path)


def test_bad_functions(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(
        "def raises(seed):\n    raise KeyError('x')\n\ndef text(seed):\n    return 'abc'\n\n"
        "def sets(seed):\n    return [{'question': object()}]\n\ndef none(seed):\n    return []\n\n"
        "def no_seed():\n    return []\n\nvalue = 3\n"
    )
    assert "KeyError: 'x'" in refused("task.py:raises", tmp_path)
    assert "expected a list of rows" in refused("task.py:text", tmp_path)
    assert "row 1 cannot be written as JSON" in refused("task.py:sets", tmp_path)
    assert "has no rows" in refused("task.py:none", tmp_path)
    assert "unexpected keyword argument" in refused("task.py:no_seed", tmp_path)
    assert "expected a function, got a int" in refused("task.py:value", tmp_path)
