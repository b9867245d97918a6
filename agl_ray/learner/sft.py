"""Supervised fine-tuning: the loss of what the model has to say, minimised over epochs of rows.

`train_sft` trains a model in memory (the warm start of examples/quickstart/base_model.py); `agl-ray sft` runs a `Tuner` on each rank
(learner/sft_run.py). Rows come from learner/sft_rows.py (conversations) or learner/sft_store.py (the best rollouts of a run).

Micro-batches are either packed (learner/packing.py; what a model of learner/model.py or one that is sharded needs), or rows of like length
padded on the right: with causal attention nothing sees the padding, so no mask is needed, which for a plain model in memory on CPU is the
faster one (1.4x at 50 tokens per row). Test it alone: tests/unit/test_learner_sft.py. Legend: B rows, T tokens, S predicted tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from agl_ray.learner.layouts import share_rows
from agl_ray.learner.packing import Packed, pack, token_logprobs
from agl_ray.learner.sft_rows import tokenize_rows
from agl_ray.trajectory.ragged import Array, Rows
from agl_ray.types import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class SFTConfig:
    """How to train.

    steps: optimiser updates (the schedule's length, also where `stop` ends it earlier). lr: peak AdamW learning rate,
    reached after `warmup_steps`; then it falls to `final_lr_share` of it at the last step (schedule linear, cosine) or stays (constant).
    batch_rows: rows per update. tokens_per_microbatch: tokens of one forward pass, padding included. packed: pack micro-batches rather
    than pad them. seed: order of the rows, anew in each epoch.
    """

    steps: int
    lr: float
    batch_rows: int = 64
    warmup_steps: int = 20
    final_lr_share: float = 0.1
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    tokens_per_microbatch: int = 2048
    packed: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "lr", "batch_rows", "max_grad_norm", "tokens_per_microbatch"):
            if getattr(self, name) <= 0:
                raise InputError(
                    f"SFTConfig.{name}: expected more than 0, got {getattr(self, name)}"
                )

    def lr_share(self, step: int) -> float:
        """The learning rate of update `step` (from 0) as a share of `lr`."""
        from agl_ray.learner import optim

        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return optim.share_left(self.schedule, done, self.final_lr_share)


@dataclass(frozen=True, slots=True)
class SFTStep:
    """One update: `step` from 1, mean loss per predicted token in nats, gradient norm before clipping, tokens without padding (of all
    ranks) and how many of them were predicted, learning rate, wall seconds."""

    step: int
    loss: float
    grad_norm: float
    num_tokens: int
    num_predicted: int
    lr: float
    seconds: float


@dataclass(frozen=True, slots=True)
class SFTResult:
    """What was done: updates (those of an earlier sitting included), mean loss of the last ten, tokens without padding, wall seconds, whether `stop` ended it."""

    steps: int
    loss: float
    num_tokens: int
    seconds: float
    stopped: bool


def batches(num_rows: int, batch_rows: int, seed: int) -> Iterator[Array]:
    """Endless batches of row indices: every epoch is a new shuffle, and a batch may span two epochs."""
    rng = np.random.default_rng(seed)
    left = np.zeros(0, np.int64)
    while True:
        while len(left) < batch_rows:
            left = np.concatenate([left, rng.permutation(num_rows)])
        yield left[:batch_rows]
        left = left[batch_rows:]


@dataclass(frozen=True, slots=True)
class Padded:
    """One micro-batch: ids int64 [B, T] padded on the right with 0, weights float32 [B, T] (0 on padding and on context)."""

    ids: Array
    weights: Array


def pad(rows: Rows, tokens: int) -> list[Padded]:
    """All rows in micro-batches of at most `tokens` tokens with padding, longest rows first; a longer row goes alone."""
    order = np.argsort(-rows.lengths, kind="stable")
    parts: list[Padded] = []
    while len(order):
        longest = int(rows.lengths[order[0]])
        members, order = np.split(order, [max(1, tokens // longest)])
        part = rows.take(members)
        filled = np.arange(longest) < part.lengths[:, None]
        ids, weights = np.zeros(filled.shape, np.int64), np.zeros(filled.shape, np.float32)
        ids[filled], weights[filled] = part.ids, part.weights
        parts.append(Padded(ids, weights))
    return parts


def token_losses(model: Any, batch: Padded) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-probabilities [S] of the weighted tokens, in nats, and their weights [S]. Logits exist for those S only."""
    import torch

    device = model.device
    ids = torch.from_numpy(batch.ids).to(device)
    row, column = (torch.from_numpy(where).to(device) for where in np.nonzero(batch.weights))
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden[row, column - 1]).float()
    losses = torch.nn.functional.cross_entropy(logits, ids[row, column], reduction="none")
    return losses, torch.from_numpy(batch.weights).to(device)[row, column]


class Tuner:
    """One rank's model and optimiser; `step` updates are done.

    With `world_size` above 1 the ranks' group (fsdp.join_group) must be joined before, the model is sharded, and every method is a
    collective: all ranks call it with the same rows. The same model, rows and config give the same weights on the same machine with the same
    number of threads.
    """

    def __init__(
        self,
        model: Any,
        config: SFTConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        import torch

        from agl_ray.learner import fsdp

        self.model, self.config, self.rank, self.world_size = model, config, rank, world_size
        self.dtype = getattr(torch, dtype)
        self.step = 0
        if world_size > 1:
            if not config.packed:
                raise InputError(
                    f"SFTConfig.packed: expected true with {world_size} ranks, got false"
                )
            fsdp.shard(model, self.dtype)
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=world_size == 1,  # torch has no fused AdamW for sharded parameters on CPU
        )

    @property
    def num_trained(self) -> int:
        """Parameters that are trained, of all ranks together."""
        groups = self.optimizer.param_groups
        return sum(parameter.numel() for group in groups for parameter in group["params"])

    def fit(
        self,
        rows: Rows,
        progress: Callable[[SFTStep], None] | None = None,
        stop: Callable[[int], bool] | None = None,
    ) -> SFTResult:
        """Train from where it stands to the last step. `progress` is called after each update; `stop` with the number of updates done,
        and ends the training where it returns True. RunError where a gradient is no number."""
        began = time.perf_counter()
        was_training = self.model.training
        self.model.train()
        stream = batches(len(rows), self.config.batch_rows, self.config.seed)
        for _ in range(self.step):
            next(stream)
        recent: list[float] = []
        num_tokens, stopped = 0, False
        while self.step < self.config.steps and not stopped:
            done = self._update(rows.take(next(stream)))
            recent = [*recent[-9:], done.loss]
            num_tokens += done.num_tokens
            if progress is not None:
                progress(done)
            stopped = stop is not None and stop(self.step)
        self.model.train(was_training)
        mean = float(np.mean(recent)) if recent else math.nan
        return SFTResult(self.step, mean, num_tokens, time.perf_counter() - began, stopped)

    def _update(self, rows: Rows) -> SFTStep:
        """One optimiser update on one batch of rows."""
        from agl_ray.learner import optim

        began = time.perf_counter()
        total = float(rows.weights.sum())
        loss = 0.0
        for summed in self._losses(rows):
            # FSDP averages gradients over the ranks; the loss is a sum over them.
            (summed / total * self.world_size).backward()
            loss += summed.item() / total
        lr = self.config.lr * self.config.lr_share(self.step)
        limit = self.config.max_grad_norm
        of = f"fine-tuning step {self.step + 1}"
        norm = optim.apply_gradients(self.model, self.optimizer, lr, limit, of)[None]
        loss = self._over_ranks(loss)
        self.step += 1
        seconds = time.perf_counter() - began
        predicted = int((rows.weights != 0).sum())
        return SFTStep(
            self.step, loss, float(norm), int(rows.lengths.sum()), predicted, lr, seconds
        )

    def loss_of(self, rows: Rows) -> float:
        """Mean loss per predicted token of `rows` in nats, with nothing trained."""
        import torch

        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            summed = sum(part.item() for part in self._losses(rows))
        self.model.train(was_training)
        return self._over_ranks(summed) / float(rows.weights.sum())

    def _losses(self, rows: Rows) -> Iterator[torch.Tensor]:
        """The summed, weighted losses of this rank's micro-batches, as many on every rank."""
        import torch

        from agl_ray.learner import fsdp

        if not self.config.packed:
            for batch in pad(rows, self.config.tokens_per_microbatch):
                with fsdp.compute_in(self.model, self.dtype):
                    losses, weights = token_losses(self.model, batch)
                yield (losses * weights).sum()
            return
        for micro in self._packed(rows):
            with fsdp.compute_in(self.model, self.dtype):
                logprobs = token_logprobs(self.model, micro)
            yield -(logprobs * torch.tensor(micro.weights, device=logprobs.device)).sum()

    def _packed(self, rows: Rows) -> list[Packed]:
        tokens = self.config.tokens_per_microbatch
        shares = share_rows(rows, np.arange(len(rows)), self.world_size)
        packed = [pack(rows.take(share), tokens) for share in shares]
        missing = max(len(micros) for micros in packed) - len(packed[self.rank])
        first = rows.take(np.array([0])).head(2)
        # A rank that has fewer micro-batches runs rows that count nothing: FSDP's collectives need every rank.
        idle = replace(first, weights=np.zeros_like(first.weights))
        return packed[self.rank] + pack(idle, tokens) * missing

    def _over_ranks(self, value: float) -> float:
        import torch

        from agl_ray.learner import fsdp

        summed = torch.tensor(value, dtype=torch.float64, device=self.model.device)
        return float(fsdp.add_over_ranks(summed))

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        from agl_ray.learner import checkpoint

        checkpoint.save(path, self.model, self.optimizer, {"step": self.step})

    def load(self, path: Path) -> None:
        """Go to the state of a checkpoint."""
        from agl_ray.learner import checkpoint

        self.step = int(checkpoint.load(path, self.model, self.optimizer)["step"])


def train_sft(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]] | Rows,
    config: SFTConfig,
    progress: Callable[[SFTStep], None] | None = None,
    stop: Callable[[int], bool] | None = None,
) -> SFTResult:
    """Train `model` (a Hugging Face causal LM) in place on `rows`: conversations, or Rows from `tokenize_rows`.

    The loss of an update is the mean over all assistant tokens of its batch. progress, stop: as in `Tuner.fit`. A second stage is a
    second call.
    """
    if not isinstance(rows, Rows):
        rows = tokenize_rows(
            tokenizer, rows, getattr(model.config, "max_position_embeddings", None)
        )
    return Tuner(model, config).fit(rows, progress, stop)
