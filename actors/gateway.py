"""Gateway: the front door for agents, one Ray Serve ingress deployment in front of the engines.

Called by: the driver's session (`serve_environment`, `start_serve`,
`gateway_deployment`, `wait_until_open`) and, over HTTP, every agent. Thin: the request's
life is `agl_ray/gateway/door.py`, HTTP is `agl_ray/gateway/http.py`; here they get a store, an engine handle and a tokenizer.
Test alone: `pytest tests/integration/test_gateway_serve.py` (a real Serve with a scripted engine).

Serve's front proxy is HAProxy by default (`gateway.proxy`). It needs the environment of `serve_environment` in the driver before
`ray.init` (so that a local Ray hands it to every process) or in `runtime_env` (a cluster joined). Everything it would share with
another cluster on the same machine is made private there: its two extra ports, its socket and state files, the replicas' ports.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import gc
import http.client
import math
import os
import random
import shutil
import socket
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

from agl_ray.config.models import RunConfig
from agl_ray.config.roles import RoleConfig
from agl_ray.gateway.door import Door, DoorSettings
from agl_ray.gateway.engine_api import GenerateChunk, GenerateRequest, GenerateResult
from agl_ray.gateway.engine_link import Busy, EngineLinks
from agl_ray.gateway.http import GatewayApp
from agl_ray.gateway.limits import Limits
from agl_ray.gateway.render import Renderer
from agl_ray.gateway.roles import EngineLost, EngineRole, OutsideRole
from agl_ray.gateway.upstream import Upstream, UpstreamSettings
from agl_ray.gateway.upstream_anthropic import AnthropicApi
from agl_ray.gateway.upstream_openai import OpenAIApi
from agl_ray.store.client import LightningStore
from agl_ray.store.link import LinkLost
from agl_ray.types import ConfigError, EngineError, InputError, RunError, WaitTimeout

DRAIN_SECONDS = 0.2  # a stopping replica takes new calls for so long; calls in flight get 5 s more (Serve's own margin)
GATEWAYS = "gateway/"  # every gateway process that starts leaves a key under it in the store
PROXY_SECONDS = 60.0  # Serve's own limit for its proxies to come up
REPLICA_PORTS = 200  # width of the port range in which gateway replicas listen


class HandleEngine:
    """The engine deployment as the door's `EngineClient`: behind its Serve handle, or over a connection to the replica that Serve
    chose for an earlier call of the session (`agl_ray/gateway/engine_link.py`). replicas: of the deployment."""

    def __init__(self, handle: Any, replicas: int) -> None:
        self._links = EngineLinks(replicas)
        # By gRPC instead of an actor call and an object ref each: half the CPU time of a call. Said here, since a handle carries the
        # options of the process that bound it, whatever this one's environment says.
        handle = handle.options(_by_reference=False)
        self._whole = handle.generate
        self._stream = handle.options(stream=True).generate_stream

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        link = self._links.of(request.session)
        if link is not None:
            with contextlib.suppress(Busy), _lost():
                return await link.generate(request)
        response = self._whole.options(session_id=request.session).remote(request)
        with _engine_errors():
            try:
                result: GenerateResult = await response
            except asyncio.CancelledError:
                response.cancel()
                raise
        self._links.learn(request.session, result.door)
        return result

    async def generate_stream(
        self, request: GenerateRequest
    ) -> AsyncGenerator[GenerateChunk, None]:
        link = self._links.of(request.session)
        if link is not None:
            with contextlib.suppress(Busy), _lost():
                async with aclosing(link.generate_stream(request)) as chunks:
                    async for chunk in chunks:
                        yield chunk
                return
        response = self._stream.options(session_id=request.session).remote(request)
        finished = False
        try:
            with _engine_errors():
                async for chunk in response:
                    finished = chunk.finish_reason is not None
                    self._links.learn(request.session, chunk.door)
                    yield chunk
        finally:
            if not finished:
                response.cancel()


@contextlib.contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except LinkLost as error:
        raise EngineLost(f"the engine replica is gone: {error}") from error


@contextlib.contextmanager
def _engine_errors() -> Iterator[None]:
    """Ray's and Serve's exceptions as ours: a dead replica is `EngineLost`, anything else that the engine raised EngineError."""
    from grpc.aio import AioRpcError
    from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError
    from ray.serve.exceptions import RayServeException, RequestCancelledError

    try:
        yield
    except (EngineError, InputError):
        raise
    except (TaskCancelledError, RequestCancelledError) as error:
        raise EngineLost(f"the engine cancelled the call: {error}") from error
    except (RayActorError, RayServeException, AioRpcError) as error:
        raise EngineLost(f"the engine replica is gone: {error}") from error
    except RayTaskError as error:
        raise EngineError(f"the engine failed: {error.cause!r}") from error


class Gateway:
    """One gateway process. Made by Serve; ready when tokenizer and tool parser are loaded and the store knows of it."""

    def __init__(
        self,
        config: RunConfig,
        model_path: str,
        namespace: str,
        engine: Any,
        frozen: Mapping[str, Any],
        keys: Mapping[str, str],
        api_key: str | None,
    ) -> None:
        renderer = _renderer(config, model_path)
        settings = DoorSettings(
            max_model_len=config.engine.max_model_len,
            call_timeout_seconds=config.gateway.call_timeout_seconds,
            overlong=config.gateway.overlong,
            limits=Limits(config.gateway.max_calls, config.gateway.max_tokens_per_rollout),
            allow_constrained=config.gateway.allow_constrained,
        )
        store = LightningStore.connect(namespace=namespace)
        main = HandleEngine(engine, config.engine.replicas)
        roles: dict[str, EngineRole | OutsideRole] = {}
        for name, role in config.roles.items():
            if role.kind == "train":
                own_adapter = name if name in config.adapters else None
                roles[name] = EngineRole(main, renderer, adapter=own_adapter)
            elif role.kind == "frozen":
                own = renderer if role.model is None else _renderer(config, role.model)
                roles[name] = EngineRole(HandleEngine(frozen[name], role.replicas), own, "frozen")
            else:
                roles[name] = OutsideRole(_upstream(name, role, keys.get(name)))
        unnamed = None if config.adapters else main
        door = Door(store, unnamed, renderer, settings, roles=roles)
        sign_in = functools.partial(_sign_in, store)
        self._app = GatewayApp(door, renderer, sign_in, api_key, watches=False)
        # torch's and vLLM's million objects stay: no collection needs to walk over them, in the middle of somebody's call.
        gc.collect()
        gc.freeze()

    def __serve_build_asgi_app__(self) -> GatewayApp:
        return self._app


def _renderer(config: RunConfig, model_path: str) -> Renderer:
    return Renderer(model_path, config.engine.tool_parser, config.engine.reasoning_parser)


def _upstream(name: str, role: RoleConfig, key: str | None) -> Upstream:
    """The client of an endpoint role; what such a role must have, its config has checked."""
    settings = UpstreamSettings(
        role=name,
        base_url=role.base_url or "",
        model=role.model or "",
        key=key,
        requests_per_minute=role.requests_per_minute,
        concurrency=role.concurrency,
        max_tokens=role.max_tokens,
    )
    api = AnthropicApi() if role.api == "anthropic" else OpenAIApi(role.max_tokens_field)
    return Upstream(settings, api)


async def _sign_in(store: LightningStore) -> None:
    """Leave a key in the store, so that the controller hears of a gateway started in place of a lost one."""
    from ray import serve

    name = serve.get_replica_context().replica_id.unique_id
    await store.put_state(f"{GATEWAYS}{name}:{os.getpid()}", b"")


def gateway_deployment(
    config: RunConfig,
    model_path: str | Path,
    namespace: str,
    engine_app: Any,
    frozen_apps: Mapping[str, Any] | None = None,
    keys: Mapping[str, str] | None = None,
    api_key: str | None = None,
) -> Any:
    """The bound Serve application of the gateway, for `serve.run(..., route_prefix="/")`.

    `model_path`: the run's base model folder (its tokenizer is used), readable on every node. `namespace`: where the `store` actor
    lives. `engine_app`: the bound engine deployment (`actors.engine.engine_deployment`), `frozen_apps` those of the
    frozen roles, by role; `keys` those of the endpoint roles, by role (`endpoint_keys`). `api_key`: what callers must show
    (`gateway_key`).
    """
    from ray import serve

    deployment = serve.deployment(
        serve.ingress()(Gateway),
        name="Gateway",
        num_replicas=1,
        max_ongoing_requests=100_000,  # calls wait at the engine, not here
        health_check_period_s=2.0,
        graceful_shutdown_timeout_s=2.0,
        graceful_shutdown_wait_loop_s=0.1,
        # Without the level, Serve would write a line for each call and then throw it away.
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
        ray_actor_options={
            "num_cpus": 0.1,
            "runtime_env": {
                "env_vars": {
                    "OMP_NUM_THREADS": "1",
                    "HF_HUB_OFFLINE": "1",
                    # Calls to the engine without two more threads on the way.
                    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
                    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
                    "TOKENIZERS_PARALLELISM": "false",
                    "CUDA_VISIBLE_DEVICES": "",
                    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
                }
            },
        },
    )
    return deployment.bind(
        config,
        str(model_path),
        namespace,
        engine_app,
        dict(frozen_apps or {}),
        dict(keys or {}),
        api_key,
    )


def gateway_key(config: RunConfig) -> str | None:
    """The key of `gateway.api_key_env`, from this process's environment; ConfigError where it is named and not there."""
    name = config.gateway.api_key_env
    if name is None:
        return None
    key = os.environ.get(name, "")
    if not key or not key.isascii() or key != key.strip():
        raise ConfigError(
            f"gateway.api_key_env: expected the environment variable {name} to hold a key (ASCII, no outer white space); "
            "set it for the driver, or leave gateway.api_key_env out"
        )
    return key


def serve_environment(config: RunConfig) -> dict[str, str]:
    """Environment variables that Serve's processes need; set them before `ray.init` starts (or joins) the cluster.

    For `gateway.proxy: haproxy` the dictionary is another one at each call: free ports for its metrics and statistics pages (9101 and
    8404 would clash with another cluster's) and for the proxy behind it that takes calls while no replica lives (at 8500 that is the proxy of
    whichever cluster of this machine was there first), private files, a range of replica ports, and a short drain.
    """
    # Serve's own 5 s are short for a busy machine: it would kill the proxy that is coming up, and fail the start with it.
    patience = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": str(PROXY_SECONDS)}
    if config.gateway.proxy == "serve":
        return patience
    metrics, stats, behind, behind_grpc = _free_ports("127.0.0.1", 4)
    folder = _short_folder(f"agl{os.getpid()}-{metrics}")
    first = _free_range(REPLICA_PORTS)
    return {
        **patience,
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(behind),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(behind_grpc),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "a"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "m"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + REPLICA_PORTS),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAIN_SECONDS),
        # A proxy that was reloaded away lets its open calls end, as long as a call may take.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(
            math.ceil(config.gateway.call_timeout_seconds) + 10
        ),
    }


def check_door(config: RunConfig) -> None:
    """InputError when `gateway.port` is given and taken, or `gateway.host` is no address of this machine."""
    _check_free(config.gateway.host, config.gateway.port)


def start_serve(config: RunConfig) -> tuple[str, int]:
    """Start Serve with its HTTP door at `gateway.host` and `gateway.port` (0: a free one) and return (host, port).

    Ray must be initialised. InputError when the port is taken or the address is not of this machine, WaitTimeout or RunError when
    Serve's proxy does not come up.
    """
    from ray import serve
    from ray.exceptions import RayActorError

    host, port = config.gateway.host, config.gateway.port
    if port == 0:
        port = _free_ports(host, 1)[0]
    else:
        _check_free(host, port)
    if folder := os.environ.get("RAY_SERVE_HAPROXY_SERVER_STATE_BASE"):
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        serve.start(http_options={"host": host, "port": port, "request_timeout_s": None})
    except TimeoutError as error:
        raise WaitTimeout(
            f"Serve's HTTP proxy at {host}:{port} to start", PROXY_SECONDS, str(error)
        ) from error
    except RayActorError as error:
        raise RunError(f"Serve's HTTP proxy at {host}:{port} died at its start: {error}") from error
    return host, port


def wait_until_open(host: str, port: int, seconds: float) -> None:
    """Block until a call would get through: HAProxy learns of a gateway replica up to a second after Serve calls it running.

    WaitTimeout, with the last answer, when the door does not open in time.
    """
    deadline = time.monotonic() + seconds
    last = "no answer"
    while time.monotonic() < deadline:
        connection = http.client.HTTPConnection(host, port, timeout=5.0)
        try:
            connection.request("GET", "/healthz")
            answer = connection.getresponse()
            last = f"HTTP {answer.status}"
            if answer.status == 200:
                return
        except OSError as error:
            last = str(error)
        finally:
            connection.close()
        time.sleep(0.05)
    raise WaitTimeout(f"the gateway at {host}:{port} to open", seconds, f"last: {last}")


def _short_folder(name: str) -> Path:
    """A private folder whose sockets' paths fit: HAProxy allows 97 bytes, and Serve puts a node id of 56 and a name below it."""
    folder = Path(tempfile.gettempdir()) / name
    return folder if len(os.fsencode(folder)) <= 36 else Path("/tmp") / name


def _check_free(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"gateway.port: cannot listen at {host}:{port} ({error.strerror}); "
                "choose another port, or 0 for a free one"
            ) from error


def _free_ports(host: str, count: int) -> list[int]:
    """Ports that are free at this moment, all different."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            try:
                probe.bind((host, 0))
            except OSError as error:
                raise InputError(
                    f"gateway.host: cannot listen at {host} ({error.strerror}); expected an address of this machine"
                ) from error
        return [probe.getsockname()[1] for probe in probes]


def _free_range(width: int) -> int:
    """The first of `width` ports below the system's ephemeral range, so that nothing else picks them by chance; a different place
    for every run. Serve itself tries the next port where one is taken."""
    return random.SystemRandom().randrange(12_000, 30_000 - width)
