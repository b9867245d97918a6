"""The critic of one rank: a second model that foretells the return of every token, its optimiser, and its part of a training step.

It is the policy's architecture from the policy's folder, with one value per token in the place of the logits (0 everywhere at first), sharded over
the same ranks. The value at t belongs to token t and is made from the tokens before it, as its log-probability is. Called by
learner/step.py; the formulas are in algorithms/gae.py and algorithms/ppo.py. Test it alone with tests/unit/test_learner_critic.py.
Legend: N tokens of the rows of one micro-batch, K trained tokens of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from agl_ray.algorithms.base import Episodes
from agl_ray.algorithms.kl import estimate
from agl_ray.algorithms.ppo import ValueInputs, value_loss
from agl_ray.learner import fsdp, optim
from agl_ray.learner.model import load_model
from agl_ray.learner.packing import Packed, rows_apart
from agl_ray.learner.prepare import Payload, Update
from agl_ray.learner.recompute import recompute_layers
from agl_ray.learner.reference import Known
from agl_ray.trajectory.ragged import Array
from agl_ray.types.errors import RunError

if TYPE_CHECKING:
    from agl_ray.algorithms.algorithm import Algorithm
    from agl_ray.config.models import LearnerConfig

Timed = Callable[[str], AbstractContextManager[None]]


class ValueHead(torch.nn.Module):
    """Hidden states [..., H] -> float32 values [..., 1], 0 before the first update on every rank."""

    def __init__(self, hidden: int, device: torch.device) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, hidden, device=device))
        self.bias = torch.nn.Parameter(torch.zeros(1, device=device))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):  # values need more than 8 bits
            return hidden.float() @ self.weight.float().T + self.bias.float()


def value_model(path: str | Path, device: str = "cpu") -> Any:
    """The causal LM of the folder with a ValueHead as its output head; float32, dropout off."""
    model = load_model(path, device)
    hidden = model.get_output_embeddings().weight.shape[1]
    model.set_output_embeddings(ValueHead(hidden, model.device))
    model.config.tie_word_embeddings = False
    return model


def token_values(model: Any, packed: Packed) -> torch.Tensor:
    """float32 [N]: what `model` expects to be earned from token t on, seeing the tokens before it in its row; 0 where `packed.weights` is 0."""
    device = fsdp.device_of(model)
    where, _, before = packed.predicted
    with rows_apart(model, packed) as apart:
        made = model(
            input_ids=torch.tensor(packed.input_ids, device=device),
            position_ids=torch.tensor(packed.position_ids, device=device),
            use_cache=False,
            logits_to_keep=torch.from_numpy(before).to(device),
            **apart,
        ).logits
    out = torch.zeros(len(packed.weights), dtype=torch.float32, device=device)
    return out.index_put((torch.from_numpy(where).to(device),), made[0, :, 0])


class Critic:
    """One rank's critic. updates: its optimiser updates so far."""

    def __init__(
        self,
        config: LearnerConfig,
        algorithm: Algorithm,
        model_path: str | Path,
        dtype: torch.dtype,
        *,
        world_size: int = 1,
        device: str = "cpu",
    ) -> None:
        self.config, self.algorithm, self.dtype = config.critic, algorithm, dtype
        self.world_size = world_size
        offload = config.cpu_offload
        self.model = value_model(model_path, fsdp.loading_device(device, offload))
        if config.gradient_checkpointing:
            recompute_layers(self.model)
        if world_size > 1 or offload:
            fsdp.shard(self.model, dtype, device, offload)
        self.optimizer = optim.make_optimizer(self.model, config.critic)
        self.updates = 0

    def step(
        self, payload: Payload, known: Known, timed: Timed, share: float
    ) -> tuple[Payload, dict[str, float]]:
        """The critic's part of a training step, before the policy's: values, advantages from them, and its own updates.

        known: of the payload's micro-batches, for `algorithm.kl` in the reward. share: what is left of the
        rate (`optim.share_at`). Returns what is left for the policy (the micro-batches have
        `advantages` now; no updates while the critic learns alone), and metrics of learner/step.py, equal on all ranks.
        """
        if payload.episodes is None:
            raise RunError(
                f"training step {payload.step}: expected a payload with episodes, since the learner has a critic, got one "
                f"without; lay it out with algorithm.advantage {self.algorithm.config.advantage}"
            )
        with timed("values"):
            episodes, paid = self._penalized(payload.episodes, payload.updates, known)
            streams, seen = self._judge(episodes, payload.updates)
        updates = [
            Update([_with_streams(micro, streams) for micro in update.micros])
            for update in payload.updates
        ]
        with timed("critic"):
            seen |= paid | self._learn(updates, share)
        alone = payload.step <= self.config.alone_steps
        return replace(payload, updates=[] if alone else updates), seen

    def _penalized(
        self, episodes: Episodes, updates: list[Update], known: Known
    ) -> tuple[Episodes, dict[str, float]]:
        """The episodes with each token's divergence from the reference taken off its reward (RLHF's form, 1909.08593)."""
        kl = self.algorithm.config.kl
        if not kl.in_reward:
            return episodes, {}
        divergences = (
            (micro, estimate(one["old_logprobs"], one["reference_logprobs"], kl.estimate))
            for update, streams in zip(updates, known, strict=True)
            for micro, one in zip(update.micros, streams, strict=True)
        )
        off = (kl.coefficient or 0.0) * self._of_all(divergences, len(episodes.rewards))
        mean = float(off.sum()) / max(1, len(episodes.lengths))
        return Episodes(episodes.rewards - off, episodes.lengths), {"kl_penalty": mean}

    @torch.no_grad()
    def _of_all(self, streams: Iterable[tuple[Packed, torch.Tensor]], number: int) -> Array:
        """float64 [K] on every rank, from the streams [N] of the micro-batches that each has."""
        values = torch.zeros(number, dtype=torch.float32, device=fsdp.device_of(self.model))
        for micro, stream in streams:
            where = np.flatnonzero(micro.weights)
            place = torch.from_numpy(micro.columns["place"][where].astype(np.int64))
            values[place.to(values.device)] = stream[torch.from_numpy(where).to(values.device)]
        return fsdp.add_over_ranks(values).double().cpu().numpy()

    def _values(self, micro: Packed) -> torch.Tensor:
        with fsdp.compute_in(self.model, self.dtype):
            return token_values(self.model, micro)

    @torch.no_grad()
    def _judge(
        self, episodes: Episodes, updates: list[Update]
    ) -> tuple[dict[str, Array], dict[str, float]]:
        """The streams of all K tokens that micro-batches take theirs from, and what is to be known of them."""
        judged = ((micro, self._values(micro)) for update in updates for micro in update.micros)
        values = self._of_all(judged, len(episodes.rewards))
        advantages, returns = self.algorithm.critic_advantages(episodes, values)
        missed, spread = returns - values, float(returns.var()) if len(returns) else 0.0
        seen = {
            "value_mean": _mean(values),
            "return_mean": _mean(returns),
            "explained_variance": 1.0 - float(missed.var()) / spread if spread > 0 else 0.0,
            "advantage_mean": _mean(advantages),
            "advantage_std": float(advantages.std()) if len(values) else 0.0,
            "advantage_max": float(abs(advantages).max(initial=0.0)),
        }
        return {"advantages": advantages, "returns": returns, "old_values": values}, seen

    def _learn(self, updates: list[Update], share: float) -> dict[str, float]:
        sums = torch.zeros(3, dtype=torch.float64, device=fsdp.device_of(self.model))
        norms = []
        for update in updates * self.config.epochs:
            for micro in update.micros:
                inputs = self._inputs(micro)
                loss, clipped = value_loss(inputs, self.config.value_clip)
                # FSDP averages gradients over the ranks; the loss is a sum over them.
                (loss * self.world_size).backward()
                counted = inputs.weights
                sums += torch.stack([loss.detach(), (counted * clipped).sum(), counted.sum()])
            rate = optim.learning_rate(self.config, self.updates, share)
            limit = self.config.max_grad_norm
            of = f"critic, update {self.updates + 1} of the run"
            norms.append(optim.apply_gradients(self.model, self.optimizer, rate, limit, of)[None])
            self.updates += 1
        loss_sum, clipped_sum, tokens = fsdp.add_over_ranks(sums).tolist()
        return {
            "value_loss": loss_sum / max(1, len(norms)),
            "value_clip_fraction": clipped_sum / max(1.0, tokens),
            "critic_grad_norm": float(torch.stack(norms).mean()) if norms else 0.0,
            "critic_lr": optim.learning_rate(self.config, max(0, self.updates - 1), share),
            "critic_updates": float(len(norms)),
        }

    def _inputs(self, micro: Packed) -> ValueInputs:
        values = self._values(micro)
        old_values, returns, scale = (
            torch.tensor(micro.columns[name], device=values.device)
            for name in ("old_values", "returns", "scale")
        )
        weights = torch.tensor(micro.weights, device=values.device)
        return ValueInputs(values, old_values, returns, weights, scale)


def _with_streams(micro: Packed, streams: Mapping[str, Array]) -> Packed:
    """The micro-batch with its tokens' part of these streams of all K tokens; 0 where a token is not trained."""
    there = micro.weights != 0
    place = micro.columns["place"][there]
    columns = dict(micro.columns)
    for name, stream in streams.items():
        columns[name] = np.zeros(len(micro.weights), np.float32)
        columns[name][there] = stream[place]
    return replace(micro, columns=columns)


def _mean(values: Array) -> float:
    return float(values.mean()) if len(values) else 0.0
