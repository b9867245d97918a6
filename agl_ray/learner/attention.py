"""Causal attention inside each row of a packed micro-batch, without the [T, T] mask.

The position_ids way of transformers computes all T x T scores and masks most of them: on a CPU, 4096 tokens of 46-token
rows take 4 times the whole step's time. Here the rows are cut out, padded to the longest of their like, and given to the
ordinary SDPA as a batch: R x L x L scores, no mask. Registered with transformers as the implementation `agl_blocks`;
a call without `blocks` (generation, a plain forward) is plain `sdpa`.

Called by learner/packing.py. tests/unit/test_learner_packing.py holds it equal to row-by-row attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from agl_ray.trajectory.ragged import Array, ragged_arange
from agl_ray.types.errors import InputError

NAME = "agl_blocks"

_without_mask: ContextVar[bool] = ContextVar("agl_blocks_without_mask", default=False)


@dataclass(frozen=True, slots=True)
class Block:
    """Neighbouring rows of like length.

    tokens: int64 [R, L], each row's places in the sequence, its last place repeated as padding. real: int64 [n], the
    places in the flattened [R * L] that are not padding.
    """

    tokens: torch.Tensor
    real: torch.Tensor


def blocks_of(lengths: Array, device: torch.device) -> list[Block]:
    """Blocks, in order, that cover rows of these lengths; padding at most doubles a row."""
    starts = np.cumsum(lengths) - lengths
    blocks: list[Block] = []
    first = 0
    while first < len(lengths):
        after = _end_of_block(lengths, first)
        longest = int(lengths[first:after].max())
        within = np.minimum(np.arange(longest)[None], lengths[first:after, None] - 1)
        row_starts = np.arange(after - first) * longest
        real = ragged_arange(row_starts, lengths[first:after])
        blocks.append(
            Block(
                torch.from_numpy(starts[first:after, None] + within).to(device),
                torch.from_numpy(real).to(device),
            )
        )
        first = after
    return blocks


def _end_of_block(lengths: Array, first: int) -> int:
    longest = shortest = int(lengths[first])
    after = first + 1
    while after < len(lengths):
        longest, shortest = max(longest, int(lengths[after])), min(shortest, int(lengths[after]))
        if longest > 2 * shortest:
            break
        after += 1
    return after


@contextmanager
def block_mask() -> Iterator[None]:
    """Within it a model with this implementation makes no attention mask: `blocks` do that work."""
    token = _without_mask.set(True)
    try:
        yield
    finally:
        _without_mask.reset(token)


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    return None if _without_mask.get() else sdpa_mask(*args, **kwargs)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    blocks: list[Block] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D]."""
    if blocks is None and _without_mask.get():
        raise InputError(
            f"model {type(module).__name__}: expected its layers to pass `blocks` on to the attention, got none, and rows of a "
            "micro-batch would see each other; this architecture cannot be trained here"
        )
    if blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    outputs = []
    for block in blocks:
        q_RHLD, k_RKLD, v_RKLD = (
            part[0].transpose(0, 1)[block.tokens].transpose(1, 2) for part in (query, key, value)
        )
        mask = _window_mask(block.tokens.shape[1], sliding_window, query.device)
        out_RLHD, _ = sdpa_attention_forward(module, q_RHLD, k_RKLD, v_RKLD, mask, **kwargs)
        outputs.append(out_RLHD.flatten(0, 1)[block.real])
    return torch.cat(outputs)[None], None


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    if window is None or length <= window:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return ((distance >= 0) & (distance < window))[None, None]


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
