"""Other people's libraries in environments of their own: made once under the cache folder, then asked for the same work as ours.

Called by the modules beside this one, each of which knows one library and its pins. Test: tests/unit/test_bench_store.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agl_ray.types import InputError, RunError

INSTALL_SECONDS = 1200.0
RUN_SECONDS = 900.0


def environment(
    cache: Path, name: str, packages: Sequence[str], size: str, borrowed: Path | None = None
) -> Path:
    """The Python of the environment `name` (`trl-1.16.0`) under `cache`; made, with a word about it, where it is not there yet.

    borrowed: a folder of packages that it may import too, behind its own. InputError where pip cannot install it (no network, no index)."""
    wanted = [*packages, *([str(borrowed)] if borrowed else [])]
    folder = (cache / "peers" / name).absolute()
    python = folder / "bin" / "python"
    made = folder / "installed.json"
    if made.is_file() and json.loads(made.read_text()) == wanted:
        return python
    library = name.replace("-", " ")
    print(f"installing {library} into {folder} (once; about {size})", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    _pip(library, [sys.executable, "-m", "venv", "--clear", str(folder)], "make an environment")
    if borrowed is not None:
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "borrowed.pth").write_text(f"{borrowed}\n")
    _pip(library, [str(python), "-m", "pip", "install", "--quiet", *packages], "install it")
    made.write_text(json.dumps(wanted))
    return python


def _pip(library: str, command: list[str], doing: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"{library} for comparison: cannot {doing}: {error}") from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        why = " ".join(errors or done.stderr.splitlines()[-3:])
        raise InputError(
            f"{library} for comparison: cannot {doing}: {why[:600]}; it needs a package index (network, or "
            "PIP_INDEX_URL), or measure without it"
        )


def ask(
    python: Path, driver: Path, plan: dict[str, Any], what: str, *, hidden: Sequence[str] = ()
) -> Any:
    """What the program `driver`, run by that Python with `plan` as JSON, says in its last line. hidden: environment variables that are
    not for it. RunError: `what` failed or took too long."""
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    # -P: the driver's folder, which is ours, stays off its path.
    command = [str(python), "-P", str(driver), json.dumps(plan)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS, env=env)
    except subprocess.TimeoutExpired as error:
        raise RunError(f"{what} took more than {RUN_SECONDS:g} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RunError(f"{what} failed: {lines[-1][:800]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
