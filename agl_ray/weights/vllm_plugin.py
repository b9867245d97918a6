"""What we put into vLLM's own processes (entry point `vllm.general_plugins`).

vLLM calls `register` in each of its processes.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading

_watching = False


def register() -> None:
    """Register the weight-transfer engine `agl`; in a child process of our engine, die with the parent."""

    if os.environ.get("AGL_RAY_ENGINE") == "1":
        _die_with_parent()


def _die_with_parent() -> None:
    """An engine core outlives a replica killed by `kill -9` and keeps its memory and cores: watch the parent, exit with it."""
    global _watching
    parent = multiprocessing.parent_process()
    if parent is None or _watching:
        return
    _watching = True
    sentinel = parent.sentinel

    def watch() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="agl-die-with-parent", daemon=True).start()


class WorkerExtension:
    pass
