"""agentlightning 0.3.0 in an environment of its own: made once under the cache folder, then asked for the same work.

Its pins: with an OpenTelemetry newer than 1.39.1 / 0.60b1 its exporter loses every span, so these are given to pip with it; Ray is
there for the naive actor around its memory store. Called by `agl_ray.bench.store` and `agl_ray.bench.trajectory`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from agl_ray.bench import store_flow
from agl_ray.bench.peers import environment as peer

VERSION = "0.3.0"
PACKAGES = (
    f"agentlightning=={VERSION}",
    "opentelemetry-api==1.39.1",
    "opentelemetry-sdk==1.39.1",
    "opentelemetry-proto==1.39.1",
    "opentelemetry-semantic-conventions==0.60b1",
    "opentelemetry-exporter-prometheus==0.60b1",  # Ray beside this OpenTelemetry wants it
)
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
    return peer.environment(cache, f"agentlightning-{VERSION}", packages, "1 GB")


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
    return peer.ask(python, driver, plan, f"agentlightning's {what}", hidden=hidden)
