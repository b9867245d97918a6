"""Objects named by a configuration: found from the current directory or the file's folder; failures are one paragraph."""

from __future__ import annotations

from pathlib import Path

import pytest

from agl_ray.config import load_object
from agl_ray.types import InputError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path / "nothing")
    (tmp_path / "helper_of_agent.py").write_text("VALUE = 41\n")
    (tmp_path / "agent.py").write_text(
        "from helper_of_agent import VALUE\n\nclass Box:\n    inner = VALUE + 1\n\n"
        "def calculator(row):\n    return row\n"
    )
    return tmp_path


def refused(spec: str, base: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_object(spec, base)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_with_its_neighbours_is_imported_once(folder: Path) -> None:
    first = load_object("agent.py:calculator", folder)
    assert first("x") == "x"
    assert load_object(f"{folder}/agent.py:calculator", Path("/")) is first
    assert load_object("agent.py:Box.inner", folder) == 42


def test_the_current_directory_comes_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = folder / "here"
    here.mkdir()
    (here / "agent.py").write_text("def calculator(row):\n    return 'here'\n")
    monkeypatch.chdir(here)
    assert load_object("agent.py:calculator", folder)(1) == "here"


def test_a_module_by_its_name() -> None:
    assert load_object("os.path:join", Path()) is __import__("os").path.join


def test_what_is_missing_is_named(folder: Path) -> None:
    assert "did you mean 'agent.py'" in refused("agnt.py:calculator", folder)
    assert "did you mean 'calculator'" in refused("agent.py:calculater", folder)
    assert "no module 'no_such_package'" in refused("no_such_package.x:y", folder)
    assert "expected 'path/file.py:name'" in refused("agent.py", folder)
    assert "is a folder" in refused("./:x", folder)


def test_a_failing_import_gives_its_cause_in_one_line(folder: Path) -> None:
    (folder / "broken.py").write_text("x = 1\nraise ValueError('two\\nlines')\n")
    message = refused("broken.py:x", folder)
    assert "ValueError: two lines (broken.py, line 2)" in message
    (folder / "lacking.py").write_text("import no_such_package_at_all\n")
    assert "No module named 'no_such_package_at_all'" in refused("lacking.py:x", folder)
    (folder / "syntax.py").write_text("def x(:\n")
    assert "SyntaxError" in refused("syntax.py:x", folder)
    (folder / "leaving.py").write_text("import sys\nsys.exit(3)\n")
    assert "SystemExit" in refused("leaving.py:x", folder)


def test_a_repaired_file_can_be_imported_again(folder: Path) -> None:
    (folder / "broken.py").write_text("raise ValueError('first')\n")
    refused("broken.py:x", folder)
    (folder / "broken.py").write_text("x = 'a longer text than before'\n")
    assert load_object("broken.py:x", folder) == "a longer text than before"
