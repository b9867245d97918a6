"""Compile cluster/locks/cpu.lock, gpu.lock and test.lock anew from pyproject.toml, cpu.in, gpu.in and cpu.override, verl-env.lock from
pyproject.toml and verl-env.in, and frameworks.lock and crewai.lock from frameworks.in and crewai.in.

test.lock holds what the extra `test` adds to cpu.lock; `make test` installs it on top. frameworks.lock and crewai.lock stand
alone: `make test-frameworks` installs them into environments of their own, and nothing of ours with them. verl-env.lock is the environment of
`learner.backend: verl` (`make venv-verl`): what agl_ray asks for without its extras, and verl.

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
ALONE = ("frameworks", "crewai")  # locks that have nothing of ours
PLAIN = ("verl-env",)  # locks that have none of our extras


def main() -> int:
    for name in sys.argv[1:] or ["cpu", "gpu", "test", *PLAIN, *ALONE]:
        lock = HERE / f"{name}.lock"
        head = [line for line in lock.read_text().splitlines() if line.startswith("#")]
        pins = _resolve("cpu", lock, HERE / "cpu.lock") if name == "test" else _resolve(name, lock)
        lock.write_text("\n".join([*head, *pins]) + "\n")
        print(f"{lock.name}: {len(pins)} packages")
    return 0


def _resolve(name: str, lock: Path, beneath: Path | None = None) -> list[str]:
    """The pins that uv finds; with `beneath` those that the extra `test` adds to that lock.

    With `--output-file` uv prefers the versions already in that file.
    """
    command = ["uv", "pip", "compile", str(HERE / f"{name}.in")]
    if name not in ALONE:
        command += ["pyproject.toml"]
    if name not in (*ALONE, *PLAIN):
        command += ["--extra", name, "--extra", "quickstart", "--extra", "dev"]
    below: set[str] = set()
    if beneath is not None:
        below = set(_pins(beneath))
        command += ["--extra", "test", "--constraint", str(beneath)]
    command += ["--python-version", PYTHON, "--no-annotate", "--no-header"]
    override = HERE / f"{name}.override"
    if override.exists():
        command += ["--override", str(override)]
    command += ["--output-file", str(lock)]
    subprocess.run(command, check=True, cwd=HERE.parent.parent, stdout=subprocess.DEVNULL)
    return [line for line in _pins(lock) if line not in below]


def _pins(lock: Path) -> list[str]:
    lines = [line.replace("+cpu", "") for line in lock.read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


if __name__ == "__main__":
    raise SystemExit(main())
