"""What travels between the Gateway and the Engine: token ids in, token ids out.

Called by: the gateway (builds `GenerateRequest`, reads `GenerateResult` or the `GenerateChunk`s of a stream) and `actors/engine.py`
(the other way round). Plain msgspec structs without vLLM, Ray or torch, so that a fake engine can speak them in a unit test.
Test alone: `pytest tests/unit/test_engine_api.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import msgspec

FinishReason = Literal["stop", "length", "abort"]
"""stop: an end-of-sequence token or a stop string; length: `max_tokens` or the model's longest sequence; abort: cancelled."""

WeightSpans = list[tuple[int, int]]
"""Run-length weight versions over the response tokens: [(start, version)], the first start is 0, starts rise."""

Place = tuple[str, int, bytes]
"""Where an engine replica takes calls directly (engine_link.py): host, port, key."""


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One model call. Ids only: rendering and tokenising are the gateway's work."""

    request_id: str
    """Unique among the calls in flight; the same id names the call in both logs."""
    prompt_ids: list[int]
    """The exact prompt, at least one id."""
    max_tokens: int
    """Most response tokens, at least 1."""
    temperature: float = 1.0
    """0 = greedy."""
    top_p: float = 1.0
    """1 = off."""
    top_k: int = 0
    """0 = off."""
    min_p: float = 0.0
    """0 = off."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: list[str] = []
    """Strings that end the response; the text of the stop string stays in the response ids."""
    stop_token_ids: list[int] = []
    """Further ids that end the response beside the model's end-of-sequence ids."""
    ignore_eos: bool = False
    """Go on past the model's end-of-sequence ids (benchmarks)."""
    min_tokens: int = 0
    """No end before so many tokens."""
    structure: dict[str, Any] | None = None
    """A form that the response must have, one of vLLM's: {"json": schema}, {"json_object": True}, {"structural_tag": JSON text}."""
    seed: int | None = None
    """Seed of this call's sampling; None = the engine's own."""
    adapter: str | None = None
    """Role whose adapter answers (`learner.lora.per_role`); None = the engine's weights as they are."""
    session: str = ""
    """Calls of one session go to the same engine replica while it lives, so that its prefix cache knows what they go on from."""


class GenerateResult(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer. `response_ids` and `logprobs` have the same length T."""

    response_ids: list[int]
    """T sampled ids, the end-of-sequence id included when one was sampled."""
    logprobs: list[float]
    """T natural-log probabilities of the sampled ids under the distribution sampled from (after temperature, top-p, ...)."""
    weight_versions: WeightSpans
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    """The id or string that ended it; None for the model's own end-of-sequence id, `length` and `abort`."""
    cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache."""
    door: Place | None = None
    """Where the replica that answered takes the session's further calls."""


class GenerateChunk(msgspec.Struct, frozen=True, kw_only=True):
    """The new part of a streamed answer; `finish_reason` is set on the last chunk and only there (it may carry no ids)."""

    response_ids: list[int]
    """The new ids, in order; chunks concatenated give `GenerateResult.response_ids`."""
    logprobs: list[float]
    finish_reason: FinishReason | None = None
    weight_versions: WeightSpans = []
    """On the last chunk only, over the whole response: an engine knows its spans for certain when it is done."""
    stop_reason: int | str | None = None
    cached_tokens: int = 0
    """As in `GenerateResult`, on the last chunk."""
    door: Place | None = None
    """As in `GenerateResult`, on the last chunk."""


def join_chunks(chunks: Iterable[GenerateChunk]) -> GenerateResult:
    """The `GenerateResult` that a finished stream amounts to. ValueError when the last chunk carries no finish reason."""
    ids: list[int] = []
    logprobs: list[float] = []
    last: GenerateChunk | None = None
    for chunk in chunks:
        ids.extend(chunk.response_ids)
        logprobs.extend(chunk.logprobs)
        last = chunk
    if last is None or last.finish_reason is None:
        raise ValueError(
            "the stream ended without a finish reason: the engine's answer is not whole"
        )
    return GenerateResult(
        response_ids=ids,
        logprobs=logprobs,
        weight_versions=last.weight_versions,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        cached_tokens=last.cached_tokens,
    )
