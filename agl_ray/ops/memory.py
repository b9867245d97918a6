"""Memory: what a run needs, part by part, roughly, and what is there.

Called by `agl-ray check`. Test alone: tests/unit/test_ops_check.py.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

from agl_ray.config import RunConfig
from agl_ray.config.model_folder import cached_model
from agl_ray.config.paths import find
from agl_ray.types.errors import InputError

# Resident GiB of each process of a run with a small model on CPU, measured; the weights of models come on top.
RAY_GIB = 0.6
ENGINE_GIB = 2.6
LEARNER_GIB = 0.8
RUNNER_GIB = 0.3
OTHERS_GIB = 1.0  # store, gateway, controller, weight sync, driver
# Bytes per parameter, all in float32.
FROZEN = 4
TRAINED = {"adamw": 16, "muon": 12}  # with gradient and the optimiser's state
DELIVERED = 4  # the whole weights that rank 0 sends


def needed_gib(config: RunConfig | None, base: Path | None = None) -> dict[str, float]:
    """GiB of this machine's memory that a local run of `config` needs, by part; None: a run with default numbers. Weights count where the
    model's folder is there already, and not where they are in a GPU. base: folder of the configuration file. InputError for a broken weights file."""
    if config is None:
        services, engine, runners = RAY_GIB + OTHERS_GIB + 0.25, ENGINE_GIB + 0.25, RUNNER_GIB
        return {"services": services, "engines": engine, "learner": LEARNER_GIB, "runners": runners}
    base = base or Path.cwd()
    frozen = sum(role.replicas for role in config.roles.values() if role.kind == "frozen")
    replicas = config.engine.replicas + frozen
    size = model_parameters(config, base)
    in_engine = (
        0 if config.engine.num_gpus else size * (4 if config.engine.dtype == "float32" else 2)
    )
    needs = {
        "services": RAY_GIB + OTHERS_GIB + config.cluster.object_store_mib / 1024,
        "engines": replicas * (ENGINE_GIB + config.engine.kv_cache_gib + _gib(in_engine)),
        "learner": config.learner.world_size * LEARNER_GIB + _gib(DELIVERED * size),
    }
    needs["learner"] += _gib(_here(config) * size * _policy_bytes(config))
    if config.algorithm.advantage == "gae":
        needs["critic"] = _gib(_here(config) * size * TRAINED["adamw"])
    # With adapters the base model is the policy without them.
    if config.algorithm.kl.on and not (
        config.learner.lora and config.algorithm.kl.reference == "base"
    ):
        needs["reference"] = _gib(
            _here(config) * FROZEN * _reference_parameters(config, base, size)
        )
    runners = sum(pool.most for pool in config.runners.by_name.values())
    return {**needs, "runners": runners * RUNNER_GIB}


def _here(config: RunConfig) -> int:
    """1 where the learner's weights are in this machine's memory, else 0."""
    return int(not config.learner.num_gpus or config.learner.cpu_offload)


def _policy_bytes(config: RunConfig) -> int:
    return FROZEN if config.learner.lora else TRAINED[config.learner.optimizer]


def _gib(number: float) -> float:
    return number / 2**30


def model_parameters(config: RunConfig, base: Path) -> int:
    """Of the run's base model; 0 where it is not made yet."""
    if config.model.path is not None:
        folder = find(config.model.path, base)
    else:
        folder = cached_model(str(config.model.make), base, config.seed, config.cache_dir)
    return 0 if folder is None else parameters_in(folder)


def _reference_parameters(config: RunConfig, base: Path, size: int) -> int:
    """Of a model folder its own; a checkpoint of ours is of the base model."""
    name = config.algorithm.kl.reference
    folder = None if name == "base" else find(name, base)
    return (folder and parameters_in(folder)) or size


def parameters_in(folder: Path) -> int:
    """Elements of the folder's safetensors files, from their headers; of other weights by their files' size, as float32."""
    total = sum(map(_elements, sorted(folder.glob("*.safetensors"))))
    return total or sum(file.stat().st_size // 4 for file in folder.glob("pytorch_model*.bin"))


def _elements(file: Path) -> int:
    with file.open("rb") as stream:
        try:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, file.stat().st_size)))
        except (struct.error, ValueError) as error:
            raise InputError(
                f"{file}: expected a safetensors file, got one whose beginning is none ({error}); write it again"
            ) from error
    return sum(math.prod(of["shape"]) for name, of in header.items() if name != "__metadata__")


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
