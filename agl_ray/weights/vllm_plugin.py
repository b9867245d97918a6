"""What we put into vLLM's own processes: the weight-transfer engine `agl`, the worker methods that feed it, and a parent watch.

Called by: vLLM (entry point `vllm.general_plugins` -> `register`, in each of its processes; `WorkerExtension` through `worker_extension_cls`),
driven by actors/engine.py through `collective_rpc`.
Test: `pytest tests/integration/test_engine_vllm.py` (a real vLLM engine).

An update has two parts. Receiving (`agl_receive`, then `agl_received` until it answers) runs in a thread of the worker while generation goes
on, into host memory. Applying (`start_weight_update`, `update_weights`, `finish_weight_update`; of adapters `agl_load_adapters`) loads what was
received; only for that is the engine paused, and nothing of the network can fail in it.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
from typing import Any

BACKEND = "agl"
"""Name of our engine in vLLM's `WeightTransferConfig`."""

_watching = False


def register() -> None:
    """Register the engine `agl` in vLLM's factory; in a child process of our engine actor, die with the parent. Idempotent."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "agl_ray.weights.vllm_transfer", "AglWeightTransferEngine"
        )
    if os.environ.get("AGL_RAY_ENGINE") == "1":
        _die_with_parent()


def _die_with_parent() -> None:
    """An engine core would outlive a replica killed by `kill -9`, with its memory and its core: watch the parent, exit with it."""
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
    """Methods added to vLLM's worker class, for `collective_rpc`; each worker answers for itself."""

    weight_transfer_engine: Any
    model_runner: Any

    def agl_receive(self, order: dict[str, Any]) -> None:
        """Start to receive a weight version (see `Receiver.begin`)."""
        self.weight_transfer_engine.receiver.begin(order)

    def agl_received(self) -> dict[str, Any] | None:
        """None while it is under way, then its outcome (see `Receiver.outcome`)."""
        outcome: dict[str, Any] | None = self.weight_transfer_engine.receiver.outcome()
        return outcome

    def agl_load_adapters(
        self, version: int, ids: dict[str, int], settings: dict[str, Any]
    ) -> None:
        """Load the received adapters of a version (see `load_adapters`)."""
        from agl_ray.weights.vllm_adapters import load_adapters

        tensors = self.weight_transfer_engine.receiver.take(version)
        load_adapters(self.model_runner, tensors, ids, settings)
