"""A whole serving system for the gateway's tests in a process of its own: Ray, store actor, Serve with HAProxy, gateway, scripted engine.

Its own process, because Serve's environment must be set before Ray starts, and because a test session has one Ray at most.
`start(folder)` gives a `System`; the child answers simple commands over a pipe. Test code only.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import sys
import urllib.request
from collections.abc import AsyncGenerator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import openai
from gateway_fakes import END, save_model_folder
from processes import descendants

from agl_ray.config.models import RunConfig
from agl_ray.config.roles import endpoint_keys
from agl_ray.gateway.engine_api import GenerateChunk, GenerateRequest, GenerateResult
from agl_ray.gateway.engine_link import EngineDoor
from agl_ray.types import LLM, AttemptedRollout, EndReason, EngineError

NAMESPACE = "gateway-test"
MOST_CALLS = 100


class ScriptedEngine:
    """An engine deployment, with a door beside Serve's as the real one has; `version` is that of its weights. It obeys the last user message: `say X`, `pid` (says its process id), `call X` (a tool call with expression X, in a spelling of
    its own), `slow`, `fail`, `die X` (its process ends, once per X). `marks` is a folder for what must outlive the process."""

    async def __init__(self, folder: str, marks: str, version: int = 3) -> None:  # type: ignore[misc]
        from tokenizers import Tokenizer

        self.door = await EngineDoor(self, MOST_CALLS).place("127.0.0.1")
        self.version = version
        self.tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
        self.marks = Path(marks)

    async def _answer(self, request: GenerateRequest) -> GenerateResult:
        text = self.tokenizer.decode(request.prompt_ids, skip_special_tokens=False)
        order = text.rpartition("<|im_start|>user\n")[2].partition(END)[0]
        verb, _, rest = order.partition(" ")
        if verb == "fail":
            raise EngineError("scripted failure")
        if verb == "die" and not (self.marks / rest).exists():
            (self.marks / rest).touch()
            os._exit(1)
        if verb == "slow":
            (self.marks / "started").touch()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                (self.marks / "aborted").touch()
                raise
        if verb == "pid":
            rest = str(os.getpid())
        if verb == "call":
            arguments = '{"expression":"' + rest + '"}'
            rest = (
                '<tool_call>\n{"name":"calculator",  "arguments":' + arguments + "}\n</tool_call>"
            )
        end = self.tokenizer.token_to_id(END)
        ids = [token for piece in rest for token in self.tokenizer.encode(piece).ids]
        ids = [*ids, end][: request.max_tokens]
        return GenerateResult(
            response_ids=ids,
            logprobs=[-0.25] * len(ids),
            weight_versions=[(0, self.version)],
            finish_reason="stop" if ids[-1] == end else "length",
            door=self.door,
        )

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        return await self._answer(request)

    async def generate_stream(
        self, request: GenerateRequest
    ) -> AsyncGenerator[GenerateChunk, None]:
        result = await self._answer(request)
        for token, logprob in zip(result.response_ids, result.logprobs, strict=True):
            yield GenerateChunk(response_ids=[token], logprobs=[logprob])
        yield GenerateChunk(
            response_ids=[],
            logprobs=[],
            finish_reason=result.finish_reason,
            weight_versions=result.weight_versions,
            door=self.door,
        )

    async def pid(self) -> int:
        return os.getpid()


def run_config(
    folder: Path, roles: dict[str, Any] | None = None, engines: int = 1, **gateway: Any
) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": str(folder)},
            "data": {"train": "x.jsonl", "val": "x.jsonl"},
            "engine": {"tool_parser": "hermes", "max_model_len": 400, "replicas": engines},
            "gateway": {"call_timeout_seconds": 40.0, **gateway},
            "roles": roles or {},
        }
    )


class System:
    """The running system as a test sees it."""

    def __init__(self, process: Any, pipe: Connection, hello: dict[str, Any], marks: Path) -> None:
        self._process, self._pipe, self.marks = process, pipe, marks
        self.url: str = hello["url"]
        self.environment: dict[str, str] = hello["environment"]

    def ask(self, command: str, *arguments: Any) -> Any:
        self._pipe.send((command, arguments))
        if not self._pipe.poll(120):
            raise TimeoutError(f"the system did not answer {command}")
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def attempt(self, mode: str = "train") -> AttemptedRollout:
        made: AttemptedRollout = self.ask("attempt", mode)
        return made

    def base(self, one: AttemptedRollout, role: str | None = None) -> str:
        llm = LLM(endpoint=self.url, model="tiny")
        return llm.get_base_url(one.rollout_id, one.attempt_id, role)

    def client(
        self, one: AttemptedRollout, role: str | None = None, **options: Any
    ) -> openai.OpenAI:
        fields = {"max_retries": 0, "timeout": 90, **options}
        return openai.OpenAI(base_url=self.base(one, role), api_key="none", **fields)

    def spans(self, one: AttemptedRollout) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.ask("spans", one.rollout_id, one.attempt_id)
        return rows

    def state(self, one: AttemptedRollout) -> dict[str, Any]:
        url = f"{self.base(one).removesuffix('/v1')}/state"
        with urllib.request.urlopen(url, timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def stop(self) -> None:
        self.ask("stop")
        self._process.join(60)


def start(
    folder: Path, roles: dict[str, Any] | None = None, engines: int = 1, **gateway: Any
) -> System:
    """Start it all; `folder` (short path) takes model, marks and Ray's files; `roles` is that config section, `gateway` are keys of that
    one. A frozen role has a scripted engine of its own; the run's own has `engines` replicas."""
    (folder / "marks").mkdir(parents=True)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, str(folder), roles, engines, gateway))
    process.start()
    if not ours.poll(240):
        process.kill()
        raise TimeoutError("the system did not start")
    hello = ours.recv()
    if isinstance(hello, Exception):
        raise hello
    return System(process, ours, hello, folder / "marks")


def _child(
    pipe: Connection,
    folder: str,
    roles: dict[str, Any] | None,
    engines: int,
    gateway: dict[str, Any],
) -> None:
    try:
        asyncio.run(_serve(pipe, Path(folder), roles, engines, gateway))
    except Exception as error:
        pipe.send(RuntimeError(f"the system failed: {error!r}"))
        raise


async def _serve(
    pipe: Connection,
    folder: Path,
    roles: dict[str, Any] | None,
    engines: int,
    gateway: dict[str, Any],
) -> None:
    from actors.engine import affinity
    from actors.gateway import (
        gateway_deployment,
        gateway_key,
        serve_environment,
        start_serve,
        wait_until_open,
    )
    from actors.store import create_store

    config = run_config(save_model_folder(folder / "model"), roles, engines, **gateway)
    environment = serve_environment(config)
    os.environ.update(environment)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    )
    import ray
    from ray import serve

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=100 * 1024 * 1024,
        _temp_dir=str(folder / "r"),
        log_to_driver=False,
    )
    store = await asyncio.to_thread(create_store, "store", NAMESPACE, "memory://")
    host, port = await asyncio.to_thread(start_serve, config)

    def engine(name: str, version: int, replicas: int = 1) -> Any:
        return serve.deployment(
            ScriptedEngine,
            name=name,
            num_replicas=replicas,
            **affinity(replicas),
            max_ongoing_requests=MOST_CALLS,
            health_check_period_s=1.0,
            graceful_shutdown_timeout_s=1.0,
        ).bind(str(folder / "model"), str(folder / "marks"), version)

    frozen = {
        name: engine(f"Engine-{name}", 0)
        for name, role in config.roles.items()
        if role.kind == "frozen"
    }
    application = gateway_deployment(
        config,
        folder / "model",
        NAMESPACE,
        engine("Engine", 3, engines),
        frozen,
        endpoint_keys(config.roles),
        gateway_key(config),
    )
    await asyncio.to_thread(serve.run, application, name="gw", route_prefix="/")
    await asyncio.to_thread(wait_until_open, host, port, 120.0)
    url = f"http://{host}:{port}"
    llm = LLM(endpoint=url, model="tiny", sampling_parameters={"max_tokens": 120})
    await store.add_resources({"main_llm": llm})
    pipe.send({"url": url, "environment": environment})
    while True:
        command, arguments = await asyncio.to_thread(pipe.recv)
        try:
            if command == "attempt":
                pipe.send(await store.start_rollout({"q": 1}, mode=arguments[0]))
            elif command == "end":
                await store.end_attempt(*arguments, EndReason.OK, reward=1.0)
                pipe.send(None)
            elif command == "spans":
                pipe.send(await store.query_span_rows(*arguments))
            elif command == "kill_gateway":
                pipe.send(await asyncio.to_thread(_kill_replica, "Gateway"))
            elif command == "gateway_port":
                pipe.send(await asyncio.to_thread(_replica_port, "Gateway", environment))
            elif command == "stop":
                break
        except Exception as error:  # noqa: BLE001 (the test is told)
            pipe.send(error)
    await asyncio.to_thread(serve.shutdown)
    ray.shutdown()
    pipe.send(None)
    sys.exit(0)


def _kill_replica(deployment: str) -> int:
    """kill -9 of the one replica of a deployment; its process id."""
    process = _replica(deployment)
    process.kill()
    return process.pid


def _replica_port(deployment: str, environment: dict[str, str]) -> int:
    """Where the replica itself listens, behind HAProxy."""
    first, last = (
        int(environment[f"RAY_SERVE_DIRECT_INGRESS_{end}_HTTP_PORT"]) for end in ("MIN", "MAX")
    )
    for connection in _replica(deployment).net_connections():
        if connection.status == "LISTEN" and first <= connection.laddr.port <= last:
            return int(connection.laddr.port)
    raise LookupError(f"{deployment} does not listen between {first} and {last}")


def _replica(deployment: str) -> Any:
    for process in descendants(os.getpid(), f"ServeReplica:gw:{deployment}"):
        return process
    raise LookupError(f"no replica of {deployment}")
