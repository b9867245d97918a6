"""The OpenAI completions dialect, requests: body -> `CallRequest` with a raw prompt. The answers are in completions_answer.py.

Called by: `agl_ray/gateway/http.py`. The prompt is text, token ids, or a list of one of those. Ids are sent as they are; a prompt, of
either form, that goes on from an earlier call is recorded as its continuation (raw_prompts.py). No template, no tools, no thoughts
taken apart. Every field acts or is refused by name. Test alone: `pytest tests/unit/test_gateway_completions.py`.

Refused on purpose: several prompts, `best_of` other than `n` (no answer is thrown away), `echo` (prompts are not scored; the caller has
them), `suffix`, `logprobs` > 1 (the engine reports the sampled token's logprob only, so `top_logprobs` of an answer is null).
"""

from __future__ import annotations

from typing import Any

import msgspec

from agl_ray.gateway.canonical import CallRequest
from agl_ray.gateway.dialects.chat import StreamOptions
from agl_ray.gateway.dialects.strict import (
    OnlyValues,
    Strict,
    given,
    only,
    read,
    refuse,
    refuse_value,
    several,
)

NAME = "openai.completions"


class Body(Strict, frozen=True, kw_only=True):
    """The body of POST /v1/completions."""

    model: str
    prompt: str | list[str | int | list[int]]
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    logprobs: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    return_token_ids: bool | None = None
    n: int | None = None
    best_of: int | None = None
    # only one value
    echo: bool | None = None
    suffix: str | None = None
    logit_bias: dict[str, Any] | None = None


_decoder = msgspec.json.Decoder(Body)
_ONLY: OnlyValues = {
    "echo": (lambda v: v is False, "the prompt is not scored; put it before the answer yourself"),
    "suffix": (lambda v: v == "", "the model writes on at the end of the prompt"),
    "logprobs": (
        lambda v: v in (0, 1),
        "the engine reports the logprob of the sampled token only; use 0 or 1",
    ),
    "logit_bias": (lambda v: v == {}, "answers are sampled from the model's own distribution"),
}


def parse(body: bytes) -> CallRequest:
    """The canonical request of a completions body; Refusal 400 names the field that is wrong or not supported."""
    asked = read(_decoder, body)
    only(asked, _ONLY)
    options = asked.stream_options
    if options is not None and not asked.stream:
        refuse("stream_options", "stream_options is only allowed when stream is true")
    if options is not None and options.include_obfuscation:
        refuse("stream_options.include_obfuscation", "include_obfuscation is not supported")
    if asked.best_of not in (None, several(asked.n)):
        refuse("best_of", "best_of: expected the same as n, since no answer is thrown away")
    stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop
    return CallRequest(
        dialect=NAME,
        model=asked.model,
        messages=[],
        prompt=_prompt(asked.prompt),
        sampling=given(
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=asked.top_k,
            min_p=asked.min_p,
            presence_penalty=asked.presence_penalty,
            frequency_penalty=asked.frequency_penalty,
            repetition_penalty=asked.repetition_penalty,
            max_tokens=asked.max_tokens,
            stop=stop or None,
            seed=asked.seed,
        ),
        n=several(asked.n),
        stream=bool(asked.stream),
        include_usage=bool(options and options.include_usage),
        logprobs=asked.logprobs is not None,
        return_token_ids=bool(asked.return_token_ids),
        metadata={**(asked.metadata or {}), **given(user=asked.user)},
    )


def _prompt(prompt: str | list[Any]) -> str | list[int]:
    """The one prompt that is given."""
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        if len(prompt) > 1:
            refuse("prompt", f"prompt: one prompt per call is answered, got {len(prompt)}")
        prompt = prompt[0]
    if not prompt:
        refuse_value("prompt", "expected text or token ids, got an empty one")
    if isinstance(prompt, list):
        for index, token in enumerate(prompt):
            if not isinstance(token, int) or isinstance(token, bool):
                refuse_value(f"prompt[{index}]", f"expected a token id, got {token!r}")
    return prompt
