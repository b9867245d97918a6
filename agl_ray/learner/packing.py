"""Rows into micro-batches of a token budget, and the log-probability of every token of one.

Several rows stand one after the other in one sequence [1, T]; `position_ids` start again at 0 with each row. A model
of `learner.model.load_model` keeps the rows apart by learner/attention.py (fast); any other `sdpa` model by the block-diagonal
mask that transformers builds from position_ids (slow on long micro-batches). The second works only with
`use_cache=False`: with the cache the rows see each other, silently (tests/unit/test_learner_packing.py shows both).

Rows that begin alike may stand there as a tree (trajectory/tree.py): the model computes a shared beginning once, T < N. All that is
known of a token (weights, columns) and all that is computed of it (log-probabilities) stays per row, [N]: a token that stands in
several rows may be trained in one of them and be context in the others, and two calls that said the same count both.

Called by learner/step.py and learner/sft.py. Legend: R rows of N tokens in one micro-batch, T of them in the model's sequence (all N,
where no row shares any), S of N predicted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from agl_ray.trajectory.ragged import Array, Rows, ragged_arange
from agl_ray.trajectory.tree import Tree, token_places
from agl_ray.types.errors import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Packed:
    """One micro-batch of whole rows.

    input_ids, position_ids: int64 [1, T]; position_ids are places in the row. lengths: int64 [R]. shared: int64 [R], how many leading
    tokens of the row are those of the row before it and stand in input_ids only there. rows: int64 [R], the rows' indices in the
    Rows they came from. weights: float32 [N] and columns: [N] each, row by row: a value belongs to a token and to its prediction
    from the tokens before it in its row. role: whose adapter computes it (`learner.lora.per_role`), None where all rows have the same weights.
    """

    input_ids: Array
    position_ids: Array
    lengths: Array
    shared: Array
    rows: Array
    weights: Array
    columns: Mapping[str, Array]
    role: str | None = None

    @classmethod
    def of(cls, rows: Rows, members: Array, shared: Array | None = None) -> Packed:
        """These members of `rows`, in this order. shared: as in Packed; None: every row stands there whole."""
        part = rows.take(members)
        if shared is None:
            shared = np.zeros(len(part), np.int64)
        position = ragged_arange(np.zeros(len(part), np.int64), part.lengths)
        own = position >= np.repeat(shared, part.lengths)
        ids = part.ids[own].astype(np.int64)[None]
        return cls(
            ids, position[own][None], part.lengths, shared, members, part.weights, part.columns
        )

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.input_ids.shape[1]

    @property
    def row_of_token(self) -> Array:
        """int64 [N]: the row, counted within this micro-batch, that each token belongs to."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @property
    def places(self) -> Array:
        """int64 [N]: where each token of each row stands in input_ids."""
        return token_places(self.lengths, self.shared)

    @property
    def predicted(self) -> tuple[Array, Array, Array]:
        """int64 [S] each, of the weighted tokens: which of the N they are, their ids, and where in input_ids the token before each stands, whose
        logits predict it."""
        where, places = np.flatnonzero(self.weights), self.places
        return where, self.input_ids[0, places[where]], places[where - 1]


def pack(rows: Rows, tokens: int) -> list[Packed]:
    """All rows in micro-batches of at most `tokens` tokens; a longer row goes alone.

    Longest first, so that rows of one micro-batch are of like length. The same rows give the same micro-batches.
    """
    order = np.argsort(-rows.lengths, kind="stable")
    return [Packed.of(rows, members) for members in _fill(rows.lengths, order, tokens)]


def pack_tree(rows: Rows, tokens: int) -> list[Packed]:
    """As `pack`, but a beginning that rows of one micro-batch share is in it once, and rows stand in the order of their ids.

    A tree of more than `tokens` tokens goes into several micro-batches, each with its own copy of the beginning that they share.
    """
    tree = Tree.of(rows)
    packs = []
    for run in tree.cut(tokens):
        shared = tree.shared[run].copy()
        shared[0] = 0
        packs.append(Packed.of(rows, tree.order[run], shared))
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


class TokenOutputs(NamedTuple):
    """float32 [N] each, 0 where `packed.weights` is 0. logprobs: log p(token | the tokens before it in its row). entropy: of the
    whole distribution that the token was drawn from, nats; None where it was not asked for."""

    logprobs: torch.Tensor
    entropy: torch.Tensor | None


def token_logprobs(model: Any, packed: Packed) -> torch.Tensor:
    """`logprobs` of `token_outputs`."""
    return token_outputs(model, packed).logprobs


def token_outputs(model: Any, packed: Packed, *, entropy: bool = False) -> TokenOutputs:
    """What the model says of every weighted token of the micro-batch.

    `model` is a Hugging Face causal LM (FSDP2-sharded or not). A column `temperature` [N] divides the logits, as the engine did when it
    sampled. Logits exist for a chunk of the S weighted tokens at a time (learner/head.py). Gradients flow to the model unless
    torch.no_grad is on.
    """
    import torch

    from agl_ray.learner.fsdp import device_of
    from agl_ray.learner.head import head_gives_logprobs

    device = device_of(model)
    where, ids, before = packed.predicted
    targets = torch.from_numpy(ids).to(device)
    temperature = packed.columns.get("temperature")
    scale = None if temperature is None else torch.from_numpy(1.0 / temperature[where]).to(device)
    given = head_gives_logprobs(model, targets, scale, entropy=entropy)
    with given, rows_apart(model, packed) as apart:
        selected = model(
            input_ids=torch.tensor(packed.input_ids, device=device),
            position_ids=torch.tensor(packed.position_ids, device=device),
            use_cache=False,
            logits_to_keep=torch.from_numpy(before).to(device),
            **apart,
        ).logits
    index = torch.from_numpy(where).to(device)
    out = torch.zeros(len(packed.weights), dtype=torch.float32, device=device)
    logprobs, *more = (out.index_put((index,), selected[0, :, i]) for i in range(selected.shape[2]))
    return TokenOutputs(logprobs, more[0] if more else None)


@contextmanager
def rows_apart(model: Any, packed: Packed) -> Iterator[dict[str, Any]]:
    """Arguments for the model's forward that keep the rows apart; empty where transformers does it from position_ids."""
    from agl_ray.learner import attention, fsdp

    if model.config._attn_implementation != attention.NAME:
        if packed.shared.any():
            raise InputError(
                f"a micro-batch whose rows share tokens: expected a model with the attention {attention.NAME} "
                f"(learner.model.load_model), got {model.config._attn_implementation}, which does not know what a token may see"
            )
        yield {}
        return
    with attention.block_mask():
        yield {"blocks": attention.blocks_of(packed.lengths, packed.shared, fsdp.device_of(model))}
