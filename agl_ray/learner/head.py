"""The output head and the log-probability (and entropy) in one: logits exist for one chunk of tokens at a time.

Neither the forward nor the backward pass holds [T, V]: the forward keeps the outputs only, the backward makes each chunk's
log-probabilities again and turns them into the gradient of its logits in place. Called by learner/packing.py; test it alone with
tests/unit/test_learner_head.py. Legend: S predicted tokens, C of them in a chunk, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 27}
"""float32 logits of a chunk, by device: 32 MiB and 512 MiB keep the matrix products large enough. Twice that is held."""


@contextmanager
def head_gives_logprobs(
    model: Any, targets: torch.Tensor, scale: torch.Tensor | None, *, entropy: bool = False
) -> Iterator[None]:
    """Within it the model's output head returns [1, S, 1] log-probabilities of `targets` int64 [S] instead of logits [1, S, V];
    with `entropy` [1, S, 2], the entropy of each whole distribution beside it. scale: float32 [S], multiplies the logits.

    The whole model is still called from its root, which FSDP2 needs; only the head's forward is another one.
    """
    head = model.get_output_embeddings()

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = _Head.apply(hidden, head.weight, head.bias, targets, scale, entropy)
        return values

    head.forward = forward
    try:
        yield
    finally:
        del head.forward


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        scale: torch.Tensor | None,
        entropy: bool,
    ) -> torch.Tensor:
        """hidden [1, S, H], weight [V, H], bias [V] -> float32 [1, S, 1 or 2]."""
        kind = hidden.device.type
        autocast = torch.is_autocast_enabled(kind)
        ctx.dtype = torch.get_autocast_dtype(kind) if autocast else hidden.dtype
        values = hidden.new_empty((1, len(targets), 2 if entropy else 1), dtype=torch.float32)
        with torch.autocast(kind, enabled=False):
            cast = weight.to(ctx.dtype)
            for part in _chunks(len(targets), len(weight), kind):
                logprobs = _logprobs(hidden[0, part], cast, bias, scale, part)
                values[0, part, 0] = logprobs.gather(1, targets[part, None])[:, 0]
                if entropy:
                    values[0, part, 1] = -(logprobs.exp().mul_(logprobs)).sum(1)
        ctx.save_for_backward(hidden, weight, bias, targets, scale, values)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets, scale, values = ctx.saved_tensors
        of_hidden, of_weight, of_bias = (
            torch.zeros_like(tensor) if needed else None
            for tensor, needed in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        )
        kind, cast = hidden.device.type, weight.to(ctx.dtype)
        for part in _chunks(len(targets), len(weight), kind):
            logprobs = _logprobs(hidden[0, part], cast, bias, scale, part)
            by_logits = _grad_of_logits(logprobs, grad[0, part], values[0, part], targets[part])
            if scale is not None:
                by_logits *= scale[part, None]
            if of_bias is not None:
                of_bias += by_logits.sum(0)
            by_logits = by_logits.to(ctx.dtype)
            if of_hidden is not None:
                of_hidden[0, part] = by_logits @ cast
            if of_weight is not None:
                _add_product(of_weight, by_logits.T, hidden[0, part].to(ctx.dtype))
        return of_hidden, of_weight, of_bias, None, None, None


def _chunks(num_tokens: int, vocabulary: int, kind: str) -> Iterator[slice]:
    size = max(1, CHUNK_LOGITS[kind] // vocabulary)
    for start in range(0, num_tokens, size):
        yield slice(start, start + size)


def _logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    part: slice,
) -> torch.Tensor:
    """float32 [C, V], memory of its own."""
    bias = None if bias is None else bias.to(weight.dtype)
    logits = torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias).float()
    if scale is not None:
        logits = logits.mul_(scale[part, None])
    return torch.log_softmax(logits, 1)


def _grad_of_logits(
    logprobs: torch.Tensor, grad: torch.Tensor, values: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """[C, V] in the memory of `logprobs` (all of them, [C, V]). grad, values: [C, 1 or 2], of log-probability and entropy.

    d log p_y / d z_j = [j = y] - p_j and dE / d z_j = -p_j (log p_j + E).
    """
    if grad.shape[1] == 1:
        made = logprobs.exp_().mul_(-grad[:, :1])
    else:
        probabilities = logprobs.exp()
        made = logprobs.add_(values[:, 1:]).mul_(grad[:, 1:]).add_(grad[:, :1])
        made = made.neg_().mul_(probabilities)
    return made.scatter_add_(1, targets[:, None], grad[:, :1])


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
