"""Compile cluster/locks/cpu.lock and gpu.lock anew from pyproject.toml, cpu.in, gpu.in and cpu.override.

`make locks` calls it; it needs `uv` on the path (`pip install uv`), and for the CPU lock an index or folder with torch's
CPU wheels (UV_FIND_LINKS or UV_EXTRA_INDEX_URL). The old lock is the preference, so only what must move moves. `+cpu` is
taken off, so that one lock serves every index of CPU wheels.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PYTHON = "3.11"


def main() -> int:
    for name in sys.argv[1:] or ["cpu", "gpu"]:
        lock = HERE / f"{name}.lock"
        head = [line for line in lock.read_text().splitlines() if line.startswith("#")]
        pins = [line.replace("+cpu", "") for line in _resolve(name, lock)]
        lock.write_text("\n".join([*head, *pins]) + "\n")
        print(f"{lock.name}: {len(pins)} packages")
    return 0


def _resolve(name: str, lock: Path) -> list[str]:
    """The pins that uv finds. With `--output-file` it prefers the versions already in that file."""
    command = ["uv", "pip", "compile", "pyproject.toml", str(HERE / f"{name}.in")]
    command += ["--extra", name, "--extra", "quickstart", "--extra", "dev"]
    command += ["--python-version", PYTHON, "--no-annotate", "--no-header"]
    override = HERE / f"{name}.override"
    if override.exists():
        command += ["--override", str(override)]
    command += ["--output-file", str(lock)]
    subprocess.run(command, check=True, cwd=HERE.parent.parent, stdout=subprocess.DEVNULL)
    return [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]


if __name__ == "__main__":
    raise SystemExit(main())
