"""Engine: the vLLM rollout engine, one replica of a Ray Serve deployment. Token ids in, token ids and logprobs out.

Called by: the gateway, through a Serve handle (`generate`, `generate_stream`, `stats`) or straight over a connection
(`agl_ray/gateway/engine_link.py`); `engine_deployment` is bound by trainer.py.
A replica takes the run's current weights before it serves its first call and follows every later version (`actors/engine_weights.py`).
vLLM itself is behind this file, `actors/engine_vllm.py` and `agl_ray/weights/vllm_*.py`; nothing else knows it.
Test alone: `pytest tests/integration/test_engine_vllm.py` (real vLLM behind a real Serve; the engine takes about 20 s to start).
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import ray
from msgspec.structs import replace

from actors.engine_vllm import (
    adapter_settings,
    check_folder,
    check_vllm,
    engine_environment,
    lora_request,
    sampling_params,
    start_vllm,
    to_chunk,
    to_result,
)
from actors.engine_weights import WeightFollower
from agl_ray.config.models import EngineConfig, RunConfig
from agl_ray.gateway.engine_api import GenerateChunk, GenerateRequest, GenerateResult
from agl_ray.gateway.engine_link import EngineDoor
from agl_ray.types.errors import EngineError, InputError
from agl_ray.waits import wait

Steps = tuple[tuple[str, Callable[[], Awaitable[Any]]], ...]
"""(what, step) of applying a version, in order."""

HEALTH_PERIOD_SECONDS = 2.0

RECEIVE_POLL_SECONDS = 0.003

LEAVE_SECONDS = 0.5
"""Between a replica's failure and its exit: time for the errors of its calls to reach the callers."""

APPLY_SECONDS = 120.0
"""Deadline of each step of applying a version: no network in it, only memory."""


def engine_deployment(
    config: RunConfig,
    model_path: str | Path,
    namespace: str,
    *,
    follow: bool = True,
    name: str = "Engine",
    replicas: int | None = None,
) -> Any:
    """The bound Serve application of the engine, for `serve.run` or to bind into the gateway.

    `model_path`: the run's base model folder (weights and tokenizer), readable on every node. `namespace`: where the
    `weight_sync` actor lives. `follow=False` serves the folder's weights as version 0 and listens to nobody (frozen roles, benchmarks, evaluation).
    `name` of the deployment; `replicas`: None = `engine.replicas`.
    """
    from ray import serve

    engine = config.engine
    number = engine.replicas if replicas is None else replicas
    deployment = serve.deployment(
        Engine,
        name=name,
        num_replicas=number,
        # vLLM's own queue keeps its batch full; beyond that calls wait at the router for whichever replica is free first.
        max_ongoing_requests=_most_calls(engine),
        **affinity(number),
        health_check_period_s=HEALTH_PERIOD_SECONDS,
        graceful_shutdown_timeout_s=3.0,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config={"enable_access_log": False},
        ray_actor_options={
            "num_cpus": engine.num_cpus,
            "num_gpus": engine.num_gpus,
            "runtime_env": {"env_vars": engine_environment(engine)},
        },
    )
    return deployment.bind(config, str(model_path), namespace, follow)


def _most_calls(engine: EngineConfig) -> int:
    """Calls that one replica takes at once."""
    return 2 * engine.max_num_seqs


def affinity(replicas: int) -> dict[str, Any]:
    """Options of a Serve deployment by which the calls of one session stick to one replica while it lives.

    Consistent hashing of `GenerateRequest.session`: every gateway finds the same replica without asking, and when one comes or goes only
    the sessions next to it move. A replica whose queue is full passes a call on to the next."""
    if replicas == 1:
        return {}  # nothing to choose, and the default router is the faster one
    from ray.serve.config import RequestRouterConfig

    router = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
    return {"request_router_config": RequestRouterConfig(request_router_class=router)}


class Engine:
    """One vLLM engine. Constructed by Serve; ready when its weights are the run's current version."""

    async def __init__(  # type: ignore[misc]
        self, config: RunConfig, model_path: str, namespace: str, follow: bool = True
    ) -> None:
        began = time.monotonic()
        check_vllm()
        check_folder(Path(model_path))
        self.replica_id, rank = _replica_identity()
        # An engine of a frozen role has the weights of its folder and no adapters.
        roles = config.adapters if follow else []
        self._adapters = {role: number for number, role in enumerate(roles, start=1)}
        self._lora = config.learner.lora
        self._engine = start_vllm(config, model_path, config.seed + rank, self._adapters)
        self._max_model_len = config.engine.max_model_len
        self._version = 0
        self._failure: str | None = None
        self._running = self._requests = self._tokens = 0
        self._updates, self._pause_seconds = 0, 0.0
        self._following: asyncio.Task[None] | None = None
        # Beyond this, calls wait at Serve's router, as those of its handles do.
        door = EngineDoor(self, _most_calls(config.engine))
        self._door = await door.place(ray.util.get_node_ip_address())
        await self._engine.update_weight_version("0")
        if follow:
            about = {"replica_id": self.replica_id, "device": _device(config.engine)}
            follower = WeightFollower(self, namespace, about)
            await follower.first(config.engine.start_seconds - (time.monotonic() - began))
            self._following = asyncio.create_task(follower.run())

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """The whole answer to one call. Held, not refused, while weights change. A cancelled call is aborted in vLLM.

        Raises InputError for a request that can never be served (empty or too long prompt, bad sampling parameters),
        EngineError when the engine fails."""
        last = None
        async for output in self._outputs(request, stream=False):
            last = output
        if last is None:
            raise EngineError(f"the engine ended call {request.request_id} without an answer")
        return replace(to_result(last, request.request_id), door=self._door)

    async def generate_stream(
        self, request: GenerateRequest
    ) -> AsyncGenerator[GenerateChunk, None]:
        """As `generate`, in chunks as they are sampled. Closing the stream early aborts the call in vLLM."""
        async with aclosing(self._outputs(request, stream=True)) as outputs:
            async for delta in outputs:
                chunk = to_chunk(delta, request.request_id)
                yield chunk if chunk.finish_reason is None else replace(chunk, door=self._door)

    async def _outputs(
        self, request: GenerateRequest, *, stream: bool
    ) -> AsyncGenerator[Any, None]:
        """vLLM's outputs for one call, with its errors put into ours and the counters kept."""
        from vllm.exceptions import VLLMError, VLLMServerError

        if self._failure is not None:
            raise EngineError(self._failure)
        self._check_prompt(request)
        params, adapter = sampling_params(request, stream=stream), self._adapter_of(request)
        prompt = {"prompt_token_ids": request.prompt_ids}
        self._running += 1
        self._requests += 1
        try:
            answers = self._engine.generate(
                prompt, params, request.request_id, lora_request=adapter
            )
            async for output in answers:
                self._tokens += len(output.outputs[0].token_ids)
                yield output
        except VLLMServerError as error:
            if self._engine.errored:
                self.fail(f"its vLLM engine core died: {error!r}")
            raise EngineError(
                f"the vLLM engine of replica {self.replica_id} failed during call {request.request_id}: {error!r}"
            ) from error
        except (VLLMError, ValueError) as error:
            raise InputError(f"vLLM refuses call {request.request_id}: {error}") from error
        finally:
            self._running -= 1

    def _adapter_of(self, request: GenerateRequest) -> Any:
        """vLLM's name of the adapter that the request asks for; None where it asks for none."""
        if request.adapter is None:
            return None
        if request.adapter not in self._adapters:
            raise InputError(
                f"call {request.request_id}: expected the adapter of one of the roles {', '.join(self._adapters) or '(none)'}, got {request.adapter}"
            )
        return lora_request(request.adapter, self._adapters[request.adapter], self._version)

    def _check_prompt(self, request: GenerateRequest) -> None:
        if not 0 < len(request.prompt_ids) < self._max_model_len:
            raise InputError(
                f"call {request.request_id}: the prompt has {len(request.prompt_ids)} ids; expected 1 to "
                f"{self._max_model_len - 1} (engine.max_model_len {self._max_model_len} holds prompt and response)"
            )

    async def check_health(self) -> None:
        """Called by Serve every 2 s. A replica that has failed says why and leaves."""
        if self._following is not None and self._following.done():
            self.fail(f"stopped following the weights: {self._following.exception()!r}")
        if self._engine.errored:
            self.fail("its vLLM engine core died")
        if self._failure is not None:
            raise EngineError(self._failure)

    async def time_calls(self, requests: list[GenerateRequest]) -> tuple[int, float]:
        """(response tokens, seconds) of answering all of `requests` at once, without HTTP, gateway or handles: for benchmarks."""
        started = time.perf_counter()
        results = await asyncio.gather(*(self.generate(request) for request in requests))
        return sum(len(r.response_ids) for r in results), time.perf_counter() - started

    async def stats(self) -> dict[str, Any]:
        """`replica_id`, `pid`, `version` (weights), `running` calls, `requests` and `tokens` answered, weight `updates` and
        `pause_seconds` spent in them, all since the start."""
        return {
            "replica_id": self.replica_id,
            "pid": os.getpid(),
            "version": self._version,
            "running": self._running,
            "requests": self._requests,
            "tokens": self._tokens,
            "updates": self._updates,
            "pause_seconds": self._pause_seconds,
        }

    # What the WeightFollower asks of us -----------------------------------------------------------

    async def receive_weights(self, order: dict[str, Any]) -> dict[str, Any]:
        """Take a version into the worker's memory while generation goes on; its outcome (`Receiver.outcome`)."""
        limit, on = order["seconds"], f"the bytes of weight version {order['version']}"
        deadline = time.monotonic() + limit
        await wait(self._rpc("agl_receive", order), on=on, seconds=limit)
        while time.monotonic() < deadline:
            # An engine in mid-step answers between two steps, so this asks no more often than it can be answered.
            outcomes = await wait(self._rpc("agl_received"), on=on, seconds=limit)
            if all(outcome is not None for outcome in outcomes):
                return next((o for o in outcomes if not o["ok"]), outcomes[0])
            await asyncio.sleep(RECEIVE_POLL_SECONDS)
        return {"ok": False, "error": f"{on} did not arrive within {limit:g} s"}

    async def apply_weights(self, version: int) -> float:
        """Load the received version with all calls held; seconds of the pause. After an error the weights are in pieces: see `fail`.

        Calls in flight keep their tokens; their cached attention of the old weights is thrown away and computed anew, and so is the
        prefix cache, so that every later token is what the new weights alone would say."""
        engine, start = self._engine, time.monotonic()
        for what, step in (
            ("pause", lambda: engine.pause_generation(mode="keep", clear_cache=False)),
            *(self._load_adapters(version) if self._adapters else self._load_weights(version)),
            ("drop its caches", lambda: engine.reset_prefix_cache(reset_running_requests=True)),
            ("resume", engine.resume_generation),
        ):
            await wait(step(), on=f"the engine core to {what}", seconds=APPLY_SECONDS)
        pause = time.monotonic() - start
        self._version, self._updates = version, self._updates + 1
        self._pause_seconds += pause
        return pause

    def _load_weights(self, version: int) -> Steps:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        engine = self._engine
        update = WeightTransferUpdateRequest({"version": version})
        return (
            ("open its weights", engine.start_weight_update),
            ("load the weights", lambda: engine.update_weights(update)),
            ("close its weights", lambda: engine.finish_weight_update(weight_version=str(version))),
        )

    def _load_adapters(self, version: int) -> Steps:
        """The base's weights stay; an update of them would also take vLLM's adapters away."""
        settings = adapter_settings(self._lora) if self._lora else {}
        given = (version, self._adapters, settings)
        return (
            ("load the roles' adapters", lambda: self._rpc("agl_load_adapters", *given)),
            ("name the version", lambda: self._engine.update_weight_version(str(version))),
        )

    def fail(self, why: str) -> None:
        """Leave: kill the engine core, so that calls in flight end as EngineError rather than go on with broken weights, then exit.

        Exiting rather than only failing the health check (three times, 2 s apart): meanwhile the router would prefer the replica
        that answers fastest, which is the one that answers with errors."""
        if self._failure is None:
            self._failure = f"engine replica {self.replica_id} leaves: {why}"
            logging.getLogger("ray.serve").error(self._failure)
            _kill_children()
            asyncio.get_running_loop().call_later(LEAVE_SECONDS, os._exit, 1)

    async def _rpc(self, method: str, *args: Any) -> list[Any]:
        answers: list[Any] = await self._engine.collective_rpc(method, args=args)
        return answers

    def __del__(self) -> None:
        if getattr(self, "_engine", None) is not None:
            _kill_children()  # vLLM's own shutdown waits seconds for its core, which has nothing to save
            self._engine.shutdown()


def _kill_children() -> None:
    for child in multiprocessing.active_children():
        child.kill()


def _replica_identity() -> tuple[str, int]:
    """(id unique to this incarnation of the replica, rank among the replicas); outside Serve (host:pid, 0)."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        context = serve.get_replica_context()
    except RayServeException:
        return f"local:{os.getpid()}", 0
    return f"{context.replica_id.unique_id}:{os.getpid()}", int(getattr(context.rank, "rank", 0))


def _device(config: EngineConfig) -> str:
    return "cuda" if config.num_gpus else "cpu"
