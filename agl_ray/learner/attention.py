"""Causal attention inside each row of a packed micro-batch, without the [T, T] mask.

The position_ids way of transformers computes all T x T scores and masks most of them: on a CPU, 4096 tokens of 46-token
rows take 4 times the whole step's time. Here the rows are cut out, padded to the longest of their like, and given to the
ordinary SDPA as a batch: R x L x L scores, no mask. Of a row that shares its first tokens with the row before it (a tree,
trajectory/tree.py) only its own tokens ask, and they see the whole row: L_own x L scores, with a mask of that size. Registered with transformers as
the implementation `agl_blocks`; a call without `blocks` (generation, a plain forward) is plain `sdpa`.

Called by learner/packing.py. tests/unit/test_learner_packing.py and test_learner_tree.py hold it equal to row-by-row attention.
Legend: R rows, Q of their tokens that ask, K that they see, H and G heads of query and of key, D of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from agl_ray.trajectory.ragged import Array, ragged_arange
from agl_ray.trajectory.tree import token_places
from agl_ray.types.errors import InputError

NAME = "agl_blocks"
MASKED_PADDING = 1.25
"""Most that padding makes of a row that shares its beginning, in either direction: there it costs its whole Q x K scores."""
MASKED_KEYS = 1 << 15
"""Most keys of such rows copied at once (a longer row goes alone)."""
GRAIN = 32
"""Tokens by which short rows may be padded beyond that: a block of their own costs more."""

_without_mask: ContextVar[bool] = ContextVar("agl_blocks_without_mask", default=False)


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of like length.

    queries: int64 [R, Q], places in the sequence of each row's own tokens, and keys: int64 [R, K], of all of its tokens; the
    last place is repeated as padding. real: int64 [n], the places in the flattened [R * Q] that are not padding. first: int64 [R], how many
    tokens of the row come before its own ones; None: none, for any row of the block.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    real: torch.Tensor
    first: torch.Tensor | None

    def mask(self, window: int | None) -> torch.Tensor | None:
        """bool [R or 1, 1, Q, K], what each query sees; None where that is everything up to itself."""
        num_queries, num_keys = self.queries.shape[1], self.keys.shape[1]
        if self.first is None and (window is None or num_keys <= window):
            return None
        device = self.queries.device
        query, key = torch.arange(num_queries, device=device), torch.arange(num_keys, device=device)
        first = torch.zeros(1, 1, dtype=torch.int64, device=device)
        if self.first is not None:
            first = self.first[:, None]
        distance = (first + query)[:, :, None] - key
        sees = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        return sees[:, None]


@dataclass(frozen=True, slots=True)
class Blocks:
    """What a micro-batch of T tokens is computed in. back: int64 [T], where the blocks' outputs, one after the other, hold each token; None
    where they are in order."""

    blocks: list[Block]
    back: torch.Tensor | None


def blocks_of(lengths: Array, shared: Array, device: torch.device) -> Blocks:
    """Blocks for rows of these lengths, the first `shared` of whose tokens are those of the row before. Padding at most doubles a row."""
    places = token_places(lengths, shared)
    if not shared.any():  # they stay in the order in which they were packed
        alike = _alike(np.arange(len(lengths)), lengths[:, None], 2.0)
        return Blocks([_block(run, lengths, shared, places, device)[0] for run in alike], None)
    own = lengths - shared
    whole, rest = np.flatnonzero(shared == 0), np.flatnonzero((shared > 0) & (own > 0))
    sizes = np.stack([own, lengths], axis=1) + GRAIN
    near = np.log(sizes[:, 0]) // np.log(MASKED_PADDING)
    by_size = whole[np.argsort(-lengths[whole], kind="stable")]
    by_both = rest[np.lexsort((-lengths[rest], -near[rest]))]
    runs = list(_alike(by_size, lengths[:, None], 2.0))
    for run in _alike(by_both, sizes, MASKED_PADDING):
        step = max(1, MASKED_KEYS // int(lengths[run].max()))
        runs += np.split(run, np.arange(step, len(run), step))
    made = [_block(run, lengths, shared, places, device) for run in runs]
    back = np.argsort(np.concatenate([asked for _, asked in made]))
    return Blocks([block for block, _ in made], torch.from_numpy(back).to(device))


def _alike(order: Array, sizes: Array, most: float) -> Iterator[Array]:
    """`order` cut into runs of rows none of whose sizes [R, number of them] is more than `most` times another's."""
    first = 0
    for after in range(1, len(order) + 1):
        if first == after - 1:
            low = high = sizes[order[first]]
        if after < len(order):
            low, high = np.minimum(low, sizes[order[after]]), np.maximum(high, sizes[order[after]])
        if after == len(order) or (high > most * low).any():
            yield order[first:after]
            first = after


def _block(
    rows: Array, lengths: Array, shared: Array, places: Array, device: torch.device
) -> tuple[Block, Array]:
    """The block of these rows, and the places of its queries that are not padding."""
    starts, first, own = (np.cumsum(lengths) - lengths)[rows], shared[rows], lengths - shared
    keys = places[starts[:, None] + _up_to(lengths[rows])]
    queries = places[(starts + first)[:, None] + _up_to(own[rows])]
    real = ragged_arange(np.arange(len(rows)) * queries.shape[1], own[rows])
    block = Block(
        torch.from_numpy(queries).to(device),
        torch.from_numpy(keys).to(device),
        torch.from_numpy(real).to(device),
        torch.from_numpy(first).to(device) if first.any() else None,
    )
    return block, queries.flatten()[real]


def _up_to(sizes: Array) -> Array:
    """int64 [R, longest]: 0, 1, ... of each row, its last place repeated."""
    return np.minimum(np.arange(sizes.max())[None], sizes[:, None] - 1)


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
    blocks: Blocks | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D]."""
    if blocks is None and _without_mask.get():
        raise InputError(
            f"model {type(module).__name__}: expected its layers to pass `blocks` on to the attention, got none, and rows of a "
            "micro-batch would see each other; this architecture cannot be trained here"
        )
    if blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    streams = [part[0].transpose(0, 1) for part in (query, key, value)]
    outputs = []
    for block in blocks.blocks:
        attend = functools.partial(_attend, module, block, sliding_window, kwargs)
        if block.first is None or not torch.is_grad_enabled():
            outputs.append(attend(*streams))
        else:
            again = {"use_reentrant": False, "preserve_rng_state": False}
            outputs.append(checkpoint(attend, *streams, **again))
    out_THD = torch.cat(outputs)
    return (out_THD if blocks.back is None else out_THD[blocks.back])[None], None


def _attend(
    module: torch.nn.Module,
    block: Block,
    window: int | None,
    more: dict[str, Any],
    query_THD: torch.Tensor,
    key_TGD: torch.Tensor,
    value_TGD: torch.Tensor,
) -> torch.Tensor:
    """[n, H, D]: the outputs of the block's tokens. What a row shares is copied for every row that shares it, so a tree's copies are made again
    in the backward pass: kept, they would cost the memory that the tree saves."""
    q_RHQD = query_THD[block.queries].transpose(1, 2)
    k_RGKD, v_RGKD = (part[block.keys].transpose(1, 2) for part in (key_TGD, value_TGD))
    out_RQHD, _ = sdpa_attention_forward(module, q_RHQD, k_RGKD, v_RGKD, block.mask(window), **more)
    made: torch.Tensor = out_RQHD.flatten(0, 1)[block.real]
    return made


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
