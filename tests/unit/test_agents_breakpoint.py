"""`agl-ray dev` in a process of its own, with a person at its stdin who stands at a breakpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

AGENTS = """
def plain(task):
    doubled = 2 * task["n"]
    breakpoint()
    return doubled


async def coroutine(task):
    doubled = 2 * task["n"]
    breakpoint()
    return doubled
"""


@pytest.mark.parametrize("name", ["plain", "coroutine"])
def test_a_breakpoint_stands_in_the_agent_and_lets_it_go_on(tmp_path: Path, name: str) -> None:
    (tmp_path / "agents.py").write_text(AGENTS)
    (tmp_path / "rows.jsonl").write_text('{"n": 20}\n{"n": 1}\n')
    words = ["dev", f"agents.py:{name}", "--data", "rows.jsonl", "--model", "m"]
    words += ["--base-url", "http://127.0.0.1:9/v1"]
    root = str(Path(__file__).parents[2])
    paths = [root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment.pop("PYTHONBREAKPOINT", None)
    done = subprocess.run(
        [sys.executable, "-m", "agl_ray.cli", *words],
        # At the first row a look, a change, and on; at the second only on.
        input="p doubled + 2\ndoubled = 7\ncontinue\ncontinue\n",
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("(Pdb)") == 4
    assert "(Pdb) 42\n" in done.stdout
    assert "ok  reward 7 " in done.stdout
    assert "2 rows: 2 ok, mean reward 4.500" in done.stdout
