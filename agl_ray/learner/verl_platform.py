"""verl on machines without an accelerator: the platform `cpu`, which verl itself does not have, over Gloo.

verl 0.9.1 knows NVIDIA, AMD and Huawei, takes a machine without any for one with NVIDIA, and registers its engines for those devices only; it takes
further platforms from outside, which is what this is. On a GPU verl's own platform is used and this file does nothing. Called by
agl_ray/learner/verl_engine.py before anything else of verl is imported. Test it alone with tests/verl (make test-verl).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

NAME = "cpu"


def use_cpu() -> None:
    """Make verl compute on the CPU in this process. To be called before verl's engines are imported; a second call does nothing."""
    from verl.plugin.platform.platform_manager import PlatformRegistry, set_platform

    if NAME in PlatformRegistry.registered_names():
        return
    platform = PlatformRegistry.register(platform=NAME)(_platform())
    set_platform(platform())
    os.environ["VERL_ENGINE_DEVICE"] = "cuda"  # under which the FSDP engine is registered


def _device_module() -> ModuleType:
    """What verl asks of torch.cuda, with answers for a machine that has none."""
    import torch

    module = ModuleType("agl_ray.learner.verl_platform.cpu")
    answers: dict[str, Any] = {
        "is_available": lambda: False,
        "current_device": lambda: NAME,
        "device_count": lambda: 1,
        "set_device": lambda index: None,
        "synchronize": lambda *index: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda: 0,
        "memory_reserved": lambda: 0,
        "mem_get_info": lambda: (0, 0),
        "get_rng_state": torch.get_rng_state,
        "set_rng_state": torch.set_rng_state,
    }
    for name, answer in answers.items():
        setattr(module, name, answer)
    return module


def _platform() -> type:
    import torch
    from verl.plugin.platform.platform_base import PlatformBase

    class PlatformCPU(PlatformBase):
        """PlatformBase's questions, answered for a CPU."""

        device_name = NAME
        vendor_name = NAME
        device_module = _device_module()

        def is_available(self) -> bool:
            return True

        def current_device(self) -> str:  # an index elsewhere; verl hands it to Tensor.to
            return NAME

        def device_count(self) -> int:
            return 1

        def set_device(self, device_index: int) -> None:
            """There is one."""

        def synchronize(self, device_index: int | None = None) -> None:
            """A CPU has no queue."""

        def manual_seed(self, seed: int) -> None:
            torch.manual_seed(seed)

        def manual_seed_all(self, seed: int) -> None:
            torch.manual_seed(seed)

        def set_allocator_settings(self, settings: str) -> None:
            """Of CUDA's allocator."""

        def empty_cache(self) -> None:
            """Of CUDA's allocator."""

        def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
            return (None, None)

        def communication_backend_name(self) -> str:
            return "gloo"

        def visible_devices_envvar(self) -> str:
            return "CUDA_VISIBLE_DEVICES"

        @contextmanager
        def nvtx_range(self, msg: str) -> Iterator[None]:
            yield

        def profiler_start(self) -> None:
            """Of CUDA's profiler."""

        def profiler_stop(self) -> None:
            """Of CUDA's profiler."""

        def ray_resource_name(self) -> str:
            return "CPU"

        def ray_noset_envvars(self) -> list[str]:
            return []

        def is_ipc_supported(self) -> bool:
            return False

        def cudart(self) -> None:
            return None

    return PlatformCPU
