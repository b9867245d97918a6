"""TRL 1.16.0 in an environment of its own, on our torch: made once under the cache folder, then given the same training steps.

Both sides run the same torch, which is borrowed from our environment (with accelerate, peft and the rest that TRL finds there); TRL,
datasets and the transformers that it is pinned to are its own. Called by `agl_ray.bench.learner`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from agl_ray.bench.peers import environment as peer
from agl_ray.types import InputError

VERSION = "1.16.0"
PACKAGES = (f"trl=={VERSION}", "transformers==5.23.0", "datasets>=4,<6")
DRIVER = Path(__file__).with_name("trl_driver.py")


def environment(cache: Path) -> Path:
    """The Python of its environment under `cache`; made where it is not there yet.

    InputError where pip cannot install it, or we have no torch to lend."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise InputError("TRL for comparison: expected torch in this environment, found none")
    borrowed = Path(torch.origin).parent.parent
    return peer.environment(cache, f"trl-{VERSION}", PACKAGES, "300 MB", borrowed)


def train(python: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """What trl_driver.py answers to this plan. RunError: it failed or took too long."""
    hidden = ("PYTHONPATH", "RAY_ADDRESS")  # nothing of ours is for that process
    found: dict[str, Any] = peer.ask(python, DRIVER, plan, "TRL's training", hidden=hidden)
    return found
