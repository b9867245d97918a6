"""Which sampling parameters a call gets, and which of them training forbids.

Called by: the door. Order of precedence: what the request says, then `metadata["sampling"]` of the rollout, then
`sampling_parameters` of the LLM resource, then the API's defaults. Of `max_tokens` the smaller of the request's and the
run's counts: an agent may ask for fewer tokens than the run allows, not for more. Test alone: `pytest tests/unit/test_gateway_door.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agl_ray.gateway.canonical import SAMPLING_KEYS, Refusal
from agl_ray.types import LLM, Rollout

_TRAIN_ONLY_VALUE: dict[str, tuple[Any, str]] = {
    "top_p": (
        1,
        "it cuts the tail off the distribution that the learner computes its probabilities of",
    ),
    "top_k": (
        0,
        "it cuts the tail off the distribution that the learner computes its probabilities of",
    ),
    "min_p": (
        0,
        "it cuts the tail off the distribution that the learner computes its probabilities of",
    ),
    "presence_penalty": (
        0,
        "it makes a token's probability depend on earlier text in a way the learner does not know",
    ),
    "frequency_penalty": (
        0,
        "it makes a token's probability depend on earlier text in a way the learner does not know",
    ),
    "repetition_penalty": (
        1,
        "it makes a token's probability depend on earlier text in a way the learner does not know",
    ),
}

_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_p": (1e-9, 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
_WHOLE = {"top_k": (-1, 2**31 - 1), "seed": (-(2**63), 2**63 - 1)}  # what fits the engine's tensors
_MAX_STOP = 16


def merge(
    request: Mapping[str, Any], rollout: Rollout, resource: LLM, number: int = 0
) -> dict[str, Any]:
    """The parameters of a call by precedence; unknown keys of the resource or the rollout are refused, naming them.

    number: how many calls the attempt has made before. A seed that the run gave counts on with it, so that no two calls of a
    rollout draw the same noise; a seed in the request is taken as it is.
    """
    override = rollout.metadata.get("sampling") or {}
    for where, given in (
        ("the LLM resource's sampling_parameters", resource.sampling_parameters),
        ("the rollout's metadata['sampling']", override),
    ):
        unknown = sorted(given.keys() - set(SAMPLING_KEYS))
        if unknown:
            raise Refusal(
                400,
                f"{where}: unknown key {unknown[0]!r}; expected some of {', '.join(SAMPLING_KEYS)}",
                param=unknown[0],
                code="unknown_parameter",
            )
    default = {**resource.sampling_parameters, **override}
    limits = [
        given["max_tokens"] for given in (request, default) if given.get("max_tokens") is not None
    ]
    merged = {**default, **request}
    if limits:
        merged["max_tokens"] = min(limits)
    if default.get("seed") is not None and request.get("seed") is None:
        merged["seed"] = (default["seed"] + number) % 2**31
    if isinstance(merged.get("stop"), str):
        merged["stop"] = [merged["stop"]]
    return {key: value for key, value in merged.items() if value is not None}


def check(sampling: Mapping[str, Any], mode: str | None) -> None:
    """Refusal 400 for a value out of range, and in train mode for one that makes the engine's logprobs unusable."""
    for key, (low, high) in _RANGES.items():
        value = sampling.get(key)
        if value is not None and not low <= value <= high:
            raise _invalid(key, f"expected {low:g} to {high:g}, got {value:g}")
    if sampling.get("repetition_penalty", 1) <= 0:
        raise _invalid(
            "repetition_penalty", f"expected more than 0, got {sampling['repetition_penalty']:g}"
        )
    if sampling.get("max_tokens", 1) < 1:
        raise _invalid("max_tokens", f"expected 1 or more, got {sampling['max_tokens']}")
    for key, (lowest, highest) in _WHOLE.items():
        if not lowest <= sampling.get(key, 1) <= highest:
            raise _invalid(key, f"expected {lowest} to {highest}, got {sampling[key]}")
    stop = sampling.get("stop", [])
    if len(stop) > _MAX_STOP or "" in stop:
        raise _invalid("stop", f"expected at most {_MAX_STOP} non-empty strings")
    if mode == "train":
        _check_training(sampling)


def _check_training(sampling: Mapping[str, Any]) -> None:
    for key, (only, why) in _TRAIN_ONLY_VALUE.items():
        value = sampling.get(key, only)
        if value != only and not (key == "top_k" and value == -1):
            raise _invalid(
                key,
                f"{value:g} is refused in a training rollout: {why}; leave it out, or use it in validation only",
            )
    if sampling.get("temperature", 1.0) == 0:
        raise _invalid(
            "temperature",
            "0 is refused in a training rollout: greedy answers are no samples of the policy, so nothing can be learned "
            "from them; leave it out, or use it in validation only",
        )


def _invalid(key: str, reason: str) -> Refusal:
    return Refusal(400, f"{key}: {reason}", param=key, code="invalid_value")
