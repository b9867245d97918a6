"""agentlightning 0.3.0 in an environment of its own: made once under the cache folder, then asked for the same work.

Its pins: with an OpenTelemetry newer than 1.39.1 / 0.60b1 its exporter loses every span, so these are given to pip with it; Ray is
there for the naive actor around its memory store. Called by `agl_ray.bench.store` and `agl_ray.bench.trajectory`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from agl_ray.bench import store_flow
from agl_ray.types import InputError, RunError

VERSION = "0.3.0"
PACKAGES = (
    f"agentlightning=={VERSION}",
    "opentelemetry-api==1.39.1",
    "opentelemetry-sdk==1.39.1",
    "opentelemetry-proto==1.39.1",
    "opentelemetry-semantic-conventions==0.60b1",
    "opentelemetry-exporter-prometheus==0.60b1",  # Ray beside this OpenTelemetry wants it
)
INSTALL_SECONDS = 1200.0
RUN_SECONDS = 900.0
DRIVER = Path(__file__).with_name("agentlightning_driver.py")
TRIPLETS = Path(__file__).with_name("triplets_driver.py")


class Case(NamedTuple):
    """path: `http` or `actor`; profile: `light` or `heavy`."""

    path: str
    profile: str
    in_flight: int
    number: int


def environment(cache: Path) -> Path:
    """The Python of its environment under `cache`; made, with a word about it, where it is not there yet.

    InputError where pip cannot install it (no network, no index)."""
    packages = [*PACKAGES, f"ray=={importlib.metadata.version('ray')}"]
    folder = (cache / "peers" / f"agentlightning-{VERSION}").absolute()
    python = folder / "bin" / "python"
    made = folder / "installed.json"
    if made.is_file() and json.loads(made.read_text()) == packages:
        return python
    print(f"installing agentlightning {VERSION} into {folder} (once; about 1 GB)", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    _pip([sys.executable, "-m", "venv", "--clear", str(folder)], "make a virtual environment")
    _pip([str(python), "-m", "pip", "install", "--quiet", *packages], "install it")
    made.write_text(json.dumps(packages))
    return python


def _pip(command: list[str], doing: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(
            f"agentlightning {VERSION} for comparison: cannot {doing}: {error}"
        ) from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        why = " ".join(errors or done.stderr.splitlines()[-3:])
        raise InputError(
            f"agentlightning {VERSION} for comparison: cannot {doing}: {why[:600]}; it needs a package index (network, or "
            "PIP_INDEX_URL), or measure without it"
        )


def measure(python: Path, cases: Sequence[Case]) -> list[dict[str, float]]:
    """Per case flows per second (`per_s`), `p50_ms`, `p99_ms`, `cpu_ms` per flow of client and server, `rss_kb_per_span`."""
    plan: dict[str, Any] = {
        "cases": list(cases),
        "spans": store_flow.SPANS,
        "attributes": store_flow.ATTRIBUTES,
        "attribute_chars": store_flow.ATTRIBUTE_CHARS,
        "prompt_ids": store_flow.PROMPT_IDS,
        "response_ids": store_flow.RESPONSE_IDS,
    }
    found: list[dict[str, float]] = ask(python, DRIVER, plan, "flows")
    return found


def ask(python: Path, driver: Path, plan: dict[str, Any], what: str) -> Any:
    """What `driver`, run by that Python with `plan` as JSON, says in its last line. RunError: its `what` failed or took too long."""
    hidden = ("PYTHONPATH", "RAY_ADDRESS")  # nothing of ours is for that process
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    # -P: the driver's folder, which is ours, stays off its path.
    command = [str(python), "-P", str(driver), json.dumps(plan)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS, env=env)
    except subprocess.TimeoutExpired as error:
        raise RunError(f"agentlightning's {what} took more than {RUN_SECONDS:g} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RunError(f"agentlightning's {what} failed: {lines[-1][:800]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
