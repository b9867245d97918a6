"""Memory: what a run needs, roughly, and what is there.

Called by `agl-ray check`. Test alone: tests/unit/test_ops_check.py.
"""

from __future__ import annotations

from pathlib import Path

from agl_ray.config import RunConfig

# Resident GiB of each process of a run with a small model on CPU, measured; larger models come on top.
RAY_GIB = 0.6
ENGINE_GIB = 2.6
LEARNER_GIB = 0.8
RUNNER_GIB = 0.3
OTHERS_GIB = 1.0  # store, gateway, controller, weight sync, driver


def needed_gib(config: RunConfig | None) -> float:
    """GiB that a local run of `config` needs besides the model's own size; None: a run with default numbers."""
    replicas, ranks, runners, cache, objects = 1, 1, 1, 0.25, 0.25
    if config is not None:
        frozen = sum(role.replicas for role in config.roles.values() if role.kind == "frozen")
        replicas, ranks = config.engine.replicas + frozen, config.learner.world_size
        runners, cache = config.runners.most, config.engine.kv_cache_gib
        objects = config.cluster.object_store_mib / 1024
    engines = replicas * (ENGINE_GIB + cache)
    return RAY_GIB + engines + ranks * LEARNER_GIB + runners * RUNNER_GIB + OTHERS_GIB + objects


def available_gib(
    meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")
) -> float | None:
    """GiB that may still be used: of the machine, and of the container where there is a limit. None where Linux does not say."""
    if not meminfo.exists():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    free = float(lines["MemAvailable"].split()[0]) / 2**20
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        free = min(free, (int(limit.read_text()) - int(used.read_text())) / 2**30)
    return free
