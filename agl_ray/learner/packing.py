"""Rows into micro-batches of a token budget, and the log-probability of every token of one.

Several rows stand one after the other in one sequence [1, T]; `position_ids` start again at 0 with each row. A model
of `learner.model.load_model` keeps the rows apart by learner/attention.py (fast); any other `sdpa` model by the block-diagonal
mask that transformers builds from position_ids (slow on long micro-batches). The second works only with
`use_cache=False`: with the cache the rows see each other, silently (tests/unit/test_learner_packing.py shows both).

Called by learner/step.py and learner/sft.py. Legend: R rows, T tokens of one micro-batch, S of them predicted, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from agl_ray.trajectory.ragged import Array, Rows, ragged_arange

if TYPE_CHECKING:
    import torch

CHUNK_LOGITS = 1 << 24  # float32 logits held at once (64 MiB), and again in the backward pass


@dataclass(frozen=True, slots=True)
class Packed:
    """One micro-batch of whole rows.

    input_ids, position_ids: int64 [1, T]; position_ids restart at 0 with each row. lengths: int64 [R]. rows: int64 [R],
    the rows' indices in the Rows they came from. weights: float32 [T] and columns: [T] each, aligned with input_ids: the value at t
    belongs to token t and to its prediction from the tokens before it.
    """

    input_ids: Array
    position_ids: Array
    lengths: Array
    rows: Array
    weights: Array
    columns: Mapping[str, Array]

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def row_of_token(self) -> Array:
        """int64 [T]: the row, counted within this micro-batch, that each token belongs to."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)


def pack(rows: Rows, tokens: int) -> list[Packed]:
    """All rows in micro-batches of at most `tokens` tokens; a longer row goes alone.

    Longest first, so that rows of one micro-batch are of like length. The same rows give the same micro-batches.
    """
    order = np.argsort(-rows.lengths, kind="stable")
    packs: list[Packed] = []
    for members in _fill(rows.lengths, order, tokens):
        part = rows.take(members)
        positions = ragged_arange(np.zeros(len(part), np.int64), part.lengths)
        packs.append(
            Packed(
                part.ids.astype(np.int64)[None],
                positions[None],
                part.lengths,
                members,
                part.weights,
                part.columns,
            )
        )
    return packs


def _fill(lengths: Array, order: Array, tokens: int) -> Iterator[Array]:
    current: list[int] = []
    held = 0
    for row in order.tolist():
        length = int(lengths[row])
        if current and held + length > tokens:
            yield np.array(current, np.int64)
            current, held = [], 0
        current.append(row)
        held += length
    if current:
        yield np.array(current, np.int64)


def token_logprobs(model: Any, packed: Packed) -> torch.Tensor:
    """float32 [T]: log p(token t | the tokens before it in its row), 0 where `packed.weights` is 0.

    `model` is a Hugging Face causal LM (FSDP2-sharded or not). A column `temperature` [T] divides the logits, as the engine did when it
    sampled. Logits exist only for the S weighted tokens and in float32 only for a chunk of them; chunks are made again
    in the backward pass. Gradients flow to the model unless torch.no_grad is on.
    """
    import torch

    device = model.device
    where = np.flatnonzero(packed.weights)
    targets = torch.from_numpy(packed.input_ids[0, where]).to(device)
    temperature = packed.columns.get("temperature")
    scale = None if temperature is None else torch.from_numpy(1.0 / temperature[where]).to(device)
    with _head_gives_logprobs(model, targets, scale), _rows_apart(model, packed) as apart:
        selected = model(
            input_ids=torch.tensor(packed.input_ids, device=device),
            position_ids=torch.tensor(packed.position_ids, device=device),
            use_cache=False,
            logits_to_keep=torch.from_numpy(where - 1).to(device),
            **apart,
        ).logits
    index = torch.from_numpy(where).to(device)
    out = torch.zeros(packed.num_tokens, dtype=torch.float32, device=device)
    return out.index_put((index,), selected[0, :, 0])


@contextmanager
def _rows_apart(model: Any, packed: Packed) -> Iterator[dict[str, Any]]:
    """Arguments for the model's forward that keep the rows apart; empty where transformers does it from position_ids."""
    from agl_ray.learner import attention

    if model.config._attn_implementation != attention.NAME:
        yield {}
        return
    with attention.block_mask():
        yield {"blocks": attention.blocks_of(packed.lengths, model.device)}


@contextmanager
def _head_gives_logprobs(
    model: Any, targets: torch.Tensor, scale: torch.Tensor | None
) -> Iterator[None]:
    """Within it the model's output head returns log-probabilities [1, S, 1] of `targets` instead of logits [1, S, V].

    The whole model is still called from its root, which FSDP2 needs; only the head's forward is another one.
    """
    head = model.get_output_embeddings()
    head.forward = functools.partial(_logprob_head, head, targets, scale)
    try:
        yield
    finally:
        del head.forward


def _logprob_head(
    head: Any, targets: torch.Tensor, scale: torch.Tensor | None, hidden: torch.Tensor
) -> torch.Tensor:
    import torch
    from torch.utils.checkpoint import checkpoint

    num_targets, vocabulary = len(targets), head.weight.shape[0]
    chunk = max(1, CHUNK_LOGITS // vocabulary)
    parts = []
    for start in range(0, num_targets, chunk):
        piece = slice(start, start + chunk)
        arguments = (
            hidden[0, piece],
            head.weight,
            head.bias,
            targets[piece],
            None if scale is None else scale[piece],
        )
        if num_targets <= chunk or not torch.is_grad_enabled():
            parts.append(_logprobs(*arguments))
        else:
            parts.append(checkpoint(_logprobs, *arguments, use_reentrant=False))
    if not parts:
        parts.append(_logprobs(hidden[0], head.weight, head.bias, targets, scale))
    return torch.cat(parts)[None, :, None].clone()  # FSDP2 wants no view from the root


def _logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    scale: torch.Tensor | None,
) -> torch.Tensor:
    import torch

    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    if scale is not None:
        logits = logits * scale[:, None]
    return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
