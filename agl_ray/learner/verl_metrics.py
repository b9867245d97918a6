"""The metrics of a step that verl's engine made, under the names of learner/step.py's METRICS where they mean the same.

Not there with verl: clip_low_fraction and clip_high_fraction (verl has pg_clipfrac), seconds_optimizer (part of seconds_forward_backward). Its own,
means over micro-batches and ranks as verl takes them: pg_clipfrac, pg_clipfrac_lower, ppo_kl. Called by learner/verl_engine.py. Test alone with
tests/unit/test_learner_verl_rows.py. Legend: N tokens of one rank's rows of one update.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from agl_ray.algorithms.base import LossInputs
from agl_ray.algorithms.kl import estimate
from agl_ray.learner import fsdp, optim
from agl_ray.learner.totals import UNSEEN, said

VERLS_OWN = ("pg_clipfrac", "pg_clipfrac_lower", "ppo_kl")
PER_TOKEN = (
    *("entropy", "entropy_full", "kl_old", "engine_kl_all"),
    *("corrected_fraction", "ratio_mean"),
)


class StepTotals:
    """Sums and maxima of one step on one rank, added over the ranks at the end. device: where collectives take their tensors."""

    def __init__(self, world_size: int, device: str) -> None:
        self.world_size, self.device = world_size, device
        self.sums: dict[str, float] = dict.fromkeys(
            ("loss", "tokens_trained", "tokens_current"), 0.0
        )
        self.maxima: dict[str, float] = {}
        self.norms: list[float] = []
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.started = time.perf_counter()

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the seconds of the block to `phase`."""
        started = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - started

    def add_update(self, output: Mapping[str, Any], of: str) -> None:
        """What verl's train_batch returned: a loss per micro-batch, times the number of ranks; its own metrics; the norm before clipping.

        of: whose update it was, for messages. RunError on every rank where the norm is not finite: verl prints a warning, leaves the update out
        and goes on."""
        metrics = output["metrics"]
        norm = float(metrics["grad_norm"])
        optim.check_norm(norm, of)
        self.norms.append(norm)
        self._add("loss", sum(output["loss"]) / self.world_size)
        for name in VERLS_OWN:
            found = metrics.get(f"actor/{name}")
            if found is not None:
                self._add(name, float(found.aggregate()) / self.world_size)

    def add_tokens(self, inputs: LossInputs, versions: torch.Tensor, version: int) -> None:
        """The tokens [N] of one update. inputs.logprobs: those of the update's forward pass. versions: int [N], by which weights each was made.
        version: of the weights that are trained."""
        counted = inputs.weights
        current = counted * (versions == version)
        old, engine = inputs.old_logprobs, inputs.engine_logprobs
        self._add("tokens_trained", counted.sum())
        self._add("tokens_current", current.sum())
        self._add("entropy", -(counted * old).sum())
        self._add("kl_old", (counted * estimate(old, inputs.logprobs, "k3")).sum())
        engine_kl = estimate(engine, old, "k3")
        self._add("engine_kl", (current * engine_kl).sum())
        self._add("engine_kl_all", (counted * engine_kl).sum())
        if inputs.entropy is not None:
            self._add("entropy_full", (counted * inputs.entropy).sum())
        off = (old - engine).abs()
        self._keep("max_logprob_diff", torch.where(current > 0, off, UNSEEN).max())
        self._keep("max_logprob_diff_all", torch.where(counted > 0, off, UNSEEN).max())
        self._keep("max_token_age", torch.where(counted > 0, version - versions, UNSEEN).max())

    def add_ratio(self, log_ratio: torch.Tensor, counted: torch.Tensor, cut: torch.Tensor) -> None:
        """[N] each: the log of the policy loss's ratio, 1 where the token counts, whether the correction capped or dropped it."""
        self._add("ratio_mean", (counted * torch.exp(log_ratio)).sum())
        self._add("corrected_fraction", (counted * cut).sum())

    def metrics(self, updates: int) -> dict[str, float]:
        """Over all ranks. A collective."""
        over = dict.fromkeys(PER_TOKEN, "tokens_trained") | {"engine_kl": "tokens_current"}
        maxima = self._over_ranks(self.maxima, largest=True)
        made = said(self._over_ranks(self.sums), maxima, over)
        for name in ("loss", *VERLS_OWN):
            if name in made:
                made[name] /= max(1, updates)
        norm = sum(self.norms) / max(1, len(self.norms))
        seconds = {f"seconds_{phase}": value for phase, value in self.seconds.items()}
        seconds["seconds_train"] = time.perf_counter() - self.started
        return {**made, "grad_norm": norm, "updates": float(updates), **seconds}

    def _add(self, name: str, value: Any) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(value)

    def _keep(self, name: str, value: Any) -> None:
        self.maxima[name] = max(self.maxima.get(name, UNSEEN), float(value))

    def _over_ranks(self, values: dict[str, float], largest: bool = False) -> dict[str, float]:
        if not values:
            return {}
        names = sorted(values)
        stacked = torch.tensor([values[name] for name in names], dtype=torch.float64)
        added = fsdp.add_over_ranks(stacked.to(self.device), largest)
        return dict(zip(names, added.tolist(), strict=True))
