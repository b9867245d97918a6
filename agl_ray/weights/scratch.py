"""A folder for bytes that only change hands: in memory where there is room. Called by vllm_adapters.py and actors/engine_weights.py."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path


def scratch(nbytes: int) -> Path:
    """A new folder for so many bytes: in memory (/dev/shm) where there is twice the room, else the temp folder. The caller removes it."""
    shm = Path("/dev/shm")
    room = shm.is_dir() and os.access(shm, os.W_OK) and shutil.disk_usage(shm).free > 2 * nbytes
    return Path(tempfile.mkdtemp(prefix="agl-weights-", dir=shm if room else None))
