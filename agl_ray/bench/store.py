"""The store against its ancestor and against what one writes first; its spans, bytes, memory; and whether its past makes it slow.

One run measures all sides on the same machine, one after the other:

    flows      take a rollout, 4 spans, end the attempt: in process, through the actor, over HTTP, in a naive actor, in agentlightning
    spans      sustained appends into one store actor
    calls      whole model calls: bytes on disk, memory of the store's process
    growth     every operation at several numbers of finished rollouts

The keys of the result are in `agl_ray.bench.store_keys`. Journals are made in a temporary folder under `cache`, on the disk that runs
use. Called by `agl_ray.cli.bench`; alone: `agl-ray bench store --quick`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agl_ray.bench.peers import agentlightning_env as agentlightning
from agl_ray.bench.store_flow import FlowClient, StoreFlows, run_flows
from agl_ray.bench.store_growth import measure_growth, worst
from agl_ray.bench.store_keys import CPU_RATIOS, FLOWS, PEER_FLOWS, RATIOS, FlowCase
from agl_ray.bench.store_load import calls, sustained
from agl_ray.bench.store_naive import NaiveFlows, naive_actor
from agl_ray.bench.store_places import in_actor, in_process, local_ray, over_http

CACHE_MIB = 16.0  # of the store whose memory is watched: full long before the last call
CALLS, QUICK_CALLS = 100_000, 1_000
SECONDS, QUICK_SECONDS = 20.0, 2.0  # of sustained appends
SIZES, QUICK_SIZES = (1_000, 10_000, 100_000, 1_000_000), (1_000, 10_000)
ROUNDS, QUICK_ROUNDS = 100, 7
AT, BEFORE = 1_000_000, 10_000  # growth_ratio compares these

PLACES = {"in_process": in_process, "actor": in_actor, "http": over_http}
Numbers = dict[str, Any]


def run_store(
    quick: bool = False, against: str | None = None, cache: Path = Path(".cache")
) -> Numbers:
    """Measure; flat keys, see the module's text. against: `agentlightning`, whose environment is made under `cache` first.

    InputError: that environment cannot be made. RunError: a store lost something, ours or theirs."""
    python = agentlightning.environment(cache) if against else None
    begin = time.perf_counter()
    cache.mkdir(parents=True, exist_ok=True)
    numbers: Numbers = {}
    with tempfile.TemporaryDirectory(prefix="bench-store-", dir=cache.absolute()) as folder:
        numbers["fsync_ms"] = fsync_ms(Path(folder))
        with local_ray():
            numbers |= asyncio.run(_with_ray(Path(folder), quick))
        if python is not None:
            numbers |= _peer(python, quick)
        sizes, rounds = (QUICK_SIZES, QUICK_ROUNDS) if quick else (SIZES, ROUNDS)
        numbers |= asyncio.run(_growth(Path(folder), sizes, rounds))
    numbers |= _ratios(numbers)
    numbers["seconds"] = time.perf_counter() - begin
    numbers["load_1min"], numbers["cpus"] = os.getloadavg()[0], os.cpu_count()
    return numbers


async def _with_ray(folder: Path, quick: bool) -> Numbers:
    numbers: Numbers = {}
    # Cases that follow one another on the same path and journal share a store: starting one costs seconds.
    for (path, journal), cases in itertools.groupby(FLOWS, lambda case: (case.path, case.journal)):
        url = "memory://" if journal == "memory" else f"sqlite:///{folder}/flow-{path}.db"
        numbers |= await _flows(path, url, list(cases), quick)
    async with in_actor(f"sqlite:///{folder}/spans.db") as place:
        load = await sustained(place, QUICK_SECONDS if quick else SECONDS)
    numbers |= {
        "spans_per_s": load.spans_per_s,
        "append_p50_ms": load.append_p50_ms,
        "append_p99_ms": load.append_p99_ms,
        "append_cpu_ms": load.cpu_ms_per_append,
        "append_foreign_share": load.foreign_share,
    }
    file = folder / "calls.db"
    written = QUICK_CALLS if quick else CALLS
    async with in_actor(f"sqlite:///{file}", cache_mib=CACHE_MIB) as place:
        found = await calls(place, written)
    size = file.stat().st_size  # closed: nothing is left in its write-ahead log
    return numbers | {
        "bytes_per_call": size / written,
        "calls_written": written,
        "calls_per_s": found.calls_per_s,
        "rss_growth_mb": found.rss_growth_mib,
        "rss_mb": found.rss_mib,
    }


async def _flows(path: str, url: str, cases: Sequence[FlowCase], quick: bool) -> Numbers:
    numbers: Numbers = {}
    async with contextlib.AsyncExitStack() as stack:
        client: FlowClient
        if path == "naive":
            handle, pid = await stack.enter_async_context(naive_actor())
        else:
            store, pid = await stack.enter_async_context(PLACES[path](url))
        for case in cases:
            if path == "naive":
                client = NaiveFlows(handle, case.profile)
            else:
                client = StoreFlows(store, case.profile)
            number = case.quick if quick else case.number
            found = await run_flows(client, pid, number, case.in_flight)
            numbers |= _flow_keys(case, found._asdict())
    return numbers


def _peer(python: Path, quick: bool) -> Numbers:
    cases = [
        agentlightning.Case(
            one.path.removeprefix("peer_"),
            one.profile,
            one.in_flight,
            one.quick if quick else one.number,
        )
        for one in PEER_FLOWS
    ]
    found = agentlightning.measure(python, cases)
    numbers: Numbers = {}
    for case, row in zip(PEER_FLOWS, found, strict=True):
        numbers |= _flow_keys(case, row)
    return numbers


def _flow_keys(case: FlowCase, row: dict[str, float]) -> Numbers:
    return {f"flow_{case.name}_{key}": value for key, value in row.items()}


async def _growth(folder: Path, sizes: Sequence[int], rounds: int) -> Numbers:
    table, opened = await measure_growth(folder, sizes, rounds)
    numbers: Numbers = {f"open_{size}_s": seconds for size, seconds in opened.items()}
    for name, times in table.items():
        numbers |= {f"growth_{name}_{size}_ms": value for size, value in times.items()}
    full = AT in sizes
    ratio, name = worst(table, *((AT, BEFORE) if full else (sizes[-1], sizes[0])))
    return numbers | {
        "growth_ratio" if full else "growth_ratio_quick": ratio,
        "growth_operation": name,
    }


def _ratios(numbers: Numbers) -> Numbers:
    ratios = {
        name: numbers[f"flow_{ours}_per_s"] / numbers[f"flow_{theirs}_per_s"]
        for name, (ours, theirs) in RATIOS.items()
        if f"flow_{theirs}_per_s" in numbers
    }
    for name, (ours, theirs) in CPU_RATIOS.items():
        if f"flow_{theirs}_cpu_ms" in numbers:
            ratios[name] = numbers[f"flow_{theirs}_cpu_ms"] / numbers[f"flow_{ours}_cpu_ms"]
    return ratios


def fsync_ms(folder: Path) -> float:
    """A write of 4 KiB with fsync, mean of 100: what the disk under the journals costs."""
    data = os.urandom(4096)
    with open(folder / "fsync", "wb", buffering=0) as file:
        begin = time.perf_counter()
        for _ in range(100):
            file.write(data)
            os.fsync(file.fileno())
        return 1e3 * (time.perf_counter() - begin) / 100
