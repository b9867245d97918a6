"""The gateway against a plain echo and a bare vLLM: calls per second, what it adds to a call, memory; and rollouts per minute.

One run measures all sides on the same machine, one after the other, with the same callers:

    echo        a plain ASGI application under uvicorn: what HTTP costs here
    gateway     the run's own: HAProxy, gateway, an engine that answers at once, the store actor with its journal on disk
    rollouts    an agent that does nothing, through one runner and the store
    vLLM        a bare `vllm serve`, then our gateway and engine on the same model (full run)

The keys of the result are in `agl_ray.bench.gateway_keys`. Called by `agl_ray.cli.bench`; alone: `agl-ray bench gateway --quick`.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from agl_ray.bench.gateway_keys import CHAT, IN_FLIGHT, LONG, LONG_NEW
from agl_ray.bench.gateway_load import Caller, Load, http_session, run_load
from agl_ray.bench.gateway_parts import make_model_folder, make_tokenizer_folder
from agl_ray.bench.gateway_rollouts import rollouts_per_min
from agl_ray.bench.gateway_serving import (
    Ours,
    System,
    bench_config,
    echo_server,
    served,
    started,
    vllm_server,
)
from agl_ray.bench.store import fsync_ms
from agl_ray.bench.store_places import Meter, memory_mib
from agl_ray.config.models import RunConfig
from agl_ray.types import RunError

Numbers = dict[str, Any]


class Amounts(NamedTuple):
    """Conversations alone and at once by size, open sessions, calls of the memory measurement, rollouts; against vLLM: conversations."""

    alone: dict[str, int]
    at_once: dict[str, int]
    sessions: int
    growth: int
    rollouts: int
    vllm: dict[str, int]


FULL = Amounts(
    alone={"chat": 500, "8k": 50},
    at_once={"chat": 2000, "8k": 400, "8k_new": 500},
    sessions=1000,
    growth=100_000,
    rollouts=20_000,
    vllm={"chat": 40, "8k": 4},
)
QUICK = Amounts(
    alone={"chat": 20, "8k": 4},
    at_once={"chat": 60, "8k": 32, "8k_new": 40},
    sessions=1000,
    growth=1600,
    rollouts=1000,
    vllm={},
)
SECOND_CALLS = 100  # of the open sessions
WARM_SHARE = 0.2


def run_gateway(
    quick: bool = False, cache: Path = Path(".cache"), amounts: Amounts | None = None
) -> Numbers:
    """Measure; flat keys, see the module's text. RunError where a call fails or a conversation does not keep its ids."""
    amounts = amounts or (QUICK if quick else FULL)
    begin = time.perf_counter()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-gateway-", dir=cache.absolute()) as name:
        folder = Path(name)
        numbers: Numbers = {"fsync_ms": fsync_ms(folder)}
        make = make_model_folder if amounts.vllm else make_tokenizer_folder
        model = make(folder / "model")
        config = bench_config(model)
        numbers |= asyncio.run(_echo(amounts))
        if amounts.vllm:
            numbers |= asyncio.run(_bare_vllm(config, model, amounts))
        with started(config, folder / "store.db") as system:
            numbers |= _ours(config, system, model, amounts)
    numbers |= _differences(numbers, amounts)
    numbers["seconds"] = time.perf_counter() - begin
    numbers["load_1min"], numbers["cpus"] = os.getloadavg()[0], os.cpu_count()
    return numbers


def _ours(config: RunConfig, system: System, model: Path, amounts: Amounts) -> Numbers:
    with served(config, system, model) as ours:
        numbers = asyncio.run(_gateway(ours, amounts))
    numbers |= asyncio.run(rollouts_per_min(config, system.store, amounts.rollouts))
    if amounts.vllm:
        with served(config, system, model, real=True) as ours:
            numbers |= asyncio.run(_against_vllm(ours, amounts))
    return numbers


async def _echo(amounts: Amounts) -> Numbers:
    numbers: Numbers = {}
    async with echo_server() as url, http_session(IN_FLIGHT) as session:

        async def place() -> str:
            return url

        for size in (CHAT, LONG, LONG_NEW):
            caller = Caller(session, size, echoes=True)
            await run_load(caller, [place] * 4, 1)
            if size.name in amounts.alone:
                load = await run_load(caller, [place] * amounts.alone[size.name], 1)
                numbers[f"echo_p50_ms_{size.name}"] = load.quantile_ms(0.5)
                numbers[f"echo_p99_ms_{size.name}"] = load.quantile_ms(0.99)
            load = await run_load(caller, [place] * amounts.at_once[size.name], IN_FLIGHT)
            numbers[f"echo_calls_per_s_{size.name}"] = load.per_s
    return numbers


async def _gateway(ours: Ours, amounts: Amounts) -> Numbers:
    numbers: Numbers = {}
    meter = Meter(ours.pid)
    async with http_session(IN_FLIGHT) as session:
        visited: list[str] = []
        for size in (CHAT, LONG, LONG_NEW):
            caller = Caller(session, size)
            await _load(ours, caller, 4, 1, visited)
            if size.name in amounts.alone:
                load = await _load(ours, caller, amounts.alone[size.name], 1, visited)
                numbers[f"p50_ms_{size.name}"] = load.quantile_ms(0.5)
                numbers[f"p99_ms_{size.name}"] = load.quantile_ms(0.99)
            rss, cpu = memory_mib(ours.pid), _cpu(ours.pid)
            everything = _tree_cpu()
            meter.start()
            load = await _load(ours, caller, amounts.at_once[size.name], IN_FLIGHT, visited)
            meter.stop()
            done = len(load.took)
            numbers[f"calls_per_s_{size.name}"] = load.per_s
            numbers[f"gateway_cpu_ms_{size.name}"] = 1e3 * (_cpu(ours.pid) - cpu) / done
            numbers[f"system_cpu_ms_{size.name}"] = 1e3 * (_tree_cpu() - everything) / done
            if size is LONG:
                grown = memory_mib(ours.pid) - rss
                numbers["rss_kb_per_call"] = 1024 * grown / done
        numbers["foreign_share"] = meter.foreign_share
        numbers["retokenized_tokens"] = await _retokenized(session, visited)
        numbers |= await _sessions(ours, session, amounts.sessions)
        numbers |= await _growth(ours, session, amounts.growth)
    return numbers


async def _load(
    ours: Ours, caller: Caller, conversations: int, in_flight: int, visited: list[str]
) -> Load:
    """Conversations in new attempts, which are made beforehand and stay open."""
    urls = await ours.places(conversations)
    visited += urls
    return await run_load(caller, [_at(url) for url in urls], in_flight)


def _at(url: str) -> Any:
    async def place() -> str:
        return url

    return place


async def _retokenized(session: Any, urls: list[str]) -> int:
    """Over these attempts; RunError where any of them was not exact."""
    total = 0
    for url in urls:
        async with session.get(f"{url.removesuffix('/v1')}/state") as answer:
            state = await answer.json()
        total += state["retokenized_tokens"] + state["branches"]
    if total:
        raise RunError(f"conversations of the benchmark did not keep their ids: {total}")
    return total


async def _sessions(ours: Ours, session: Any, number: int) -> Numbers:
    """Many open conversations: their memory, and a call when they are there."""
    rss = memory_mib(ours.pid)
    urls = await ours.places(number)
    caller = Caller(session, CHAT)
    await run_load(caller, [_at(url) for url in urls], IN_FLIGHT, turns=1)
    grown = memory_mib(ours.pid) - rss
    load = await run_load(caller, [_at(url) for url in urls[:SECOND_CALLS]], 1, turns=1)
    return {
        "open_sessions": number,
        "sessions_rss_mb": grown,
        "sessions_p50_ms": load.quantile_ms(0.5),
    }


async def _growth(ours: Ours, session: Any, number: int) -> Numbers:
    """Conversations that end, one after the other: the gateway may not remember them for ever."""
    caller = Caller(session, CHAT)

    async def work(left: Any) -> None:
        for _ in left:
            url = await ours.place()
            await caller.converse(url)
            await ours.end(url)

    conversations = number // CHAT.turns
    warm = int(conversations * WARM_SHARE)
    left = iter(range(warm))
    await asyncio.gather(*(work(left) for _ in range(IN_FLIGHT)))
    rss = memory_mib(ours.pid)
    left = iter(range(conversations - warm))
    await asyncio.gather(*(work(left) for _ in range(IN_FLIGHT)))
    end = memory_mib(ours.pid)
    return {
        "growth_calls": conversations * CHAT.turns,
        "rss_growth_mb": end - rss,
        "rss_mb": end,
    }


async def _bare_vllm(config: RunConfig, model: Path, amounts: Amounts) -> Numbers:
    async with vllm_server(model, config) as url, http_session(IN_FLIGHT) as session:
        return await _measure_vllm("vllm", session, lambda: _at(url), amounts)


async def _against_vllm(ours: Ours, amounts: Amounts) -> Numbers:
    async with http_session(IN_FLIGHT) as session:
        return await _measure_vllm("ours", session, lambda: ours.place, amounts)


async def _measure_vllm(whose: str, session: Any, place: Any, amounts: Amounts) -> Numbers:
    numbers: Numbers = {}
    for size in (CHAT, LONG):
        number = amounts.vllm[size.name]
        caller = Caller(session, size)
        await run_load(caller, [place()], 1)
        load = await run_load(caller, [place() for _ in range(max(1, number // 4))], 1)
        numbers[f"{whose}_p50_ms_{size.name}"] = load.quantile_ms(0.5)
        load = await run_load(caller, [place() for _ in range(number)], IN_FLIGHT)
        numbers[f"{whose}_calls_per_s_{size.name}"] = load.per_s
    return numbers


def _differences(numbers: Numbers, amounts: Amounts) -> Numbers:
    made: Numbers = {}
    for share in ("p50", "p99"):
        for size, tail in ((CHAT, ""), (LONG, "_8k")):
            key = f"{share}_ms_{size.name}"
            made[f"added_{share}_ms{tail}"] = numbers[key] - numbers[f"echo_{key}"]
    for name in amounts.vllm:
        rates = [numbers[f"{whose}_calls_per_s_{name}"] for whose in ("ours", "vllm")]
        made[f"vllm_ratio_{name}"] = rates[0] / rates[1]
        medians = [numbers[f"{whose}_p50_ms_{name}"] for whose in ("ours", "vllm")]
        made[f"vllm_added_p50_ms_{name}"] = medians[0] - medians[1]
    return made


def _cpu(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def _tree_cpu() -> float:
    """CPU seconds of all processes that this one has started."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total
