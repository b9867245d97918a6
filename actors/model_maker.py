"""ModelMaker: makes the base model (warm start by SFT) in a process of its own, and lives only for that.

Kept apart from the driver so that the driver never imports torch, and so that its memory is free again for the run.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from agl_ray.config.imports import load_object

Step = tuple[str, float, str]  # (what, share done from 0 to 1, a few words)


class ModelMaker:
    """Calls a recipe `function(folder, seed, progress)` in a thread; `progress()` tells how far it is."""

    def __init__(self) -> None:
        self._last: Step = ("starting", 0.0, "")

    async def make(self, recipe: str, base: str, folder: str, seed: int) -> dict[str, Any]:
        """Run the recipe named by `recipe` (an import string, resolved against `base`) into `folder`."""
        return await asyncio.to_thread(self._make, recipe, base, folder, seed)

    def _make(self, recipe: str, base: str, folder: str, seed: int) -> dict[str, Any]:
        import torch

        torch.set_num_threads(1)  # two threads on two busy cores are ten times slower than one
        function = load_object(recipe, Path(base))
        facts = function(Path(folder), seed, self._tell)
        return dict(facts or {})

    def _tell(self, what: str, share: float, detail: str = "") -> None:
        self._last = (what, share, detail)

    async def progress(self) -> Step:
        return self._last
