"""The learner of one rank: model, optimiser, and one training step. Plain torch; one process is enough.

Called by learner/backend.py; blind to algorithms (algorithms/base.py) and to where rows come from (learner/prepare.py). Test it alone with
tests/unit/test_learner_step.py. Legend: T tokens of one micro-batch.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from agl_ray.algorithms.algorithm import make_algorithm
from agl_ray.algorithms.base import LossInputs
from agl_ray.algorithms.kl import estimate
from agl_ray.learner import checkpoint, fsdp, lora, optim
from agl_ray.learner.choice import choose
from agl_ray.learner.critic import Critic
from agl_ray.learner.export import export
from agl_ray.learner.model import load_model
from agl_ray.learner.packing import Packed, TokenOutputs, token_outputs
from agl_ray.learner.prepare import Payload, Update, with_advantages
from agl_ray.learner.recompute import recompute_layers
from agl_ray.learner.reference import Known, make_reference, penalties
from agl_ray.learner.totals import UNSEEN, said
from agl_ray.learner.weights import delivered
from agl_ray.types.errors import ConfigError, RunError

if TYPE_CHECKING:
    from agl_ray.config.algorithm import AlgorithmConfig
    from agl_ray.config.models import LearnerConfig

METRICS = """
Of the update: loss, grad_norm (before clipping), lr, updates (their number; loss and grad_norm are means over them, lr is the last), ratio_mean (pi / pi_old), clip_low_fraction,
clip_high_fraction, corrected_fraction, cov_fraction (losses clip_cov, kl_cov; shares of the trained tokens), entropy (mean -log pi_old of the sampled tokens, nats),
entropy_full (mean entropy of the whole distributions, nats; with algorithm.entropy_coefficient only). kl_old: mean k3 of the policy
at the start of the step against the one now, nats, a mean over the updates; 0 with a single one. With a reference (`algorithm.kl`):
kl_reference, mean k3 of the policy at the start of the step against it, nats; kl_penalty, mean of what was taken off a unit's reward
(`where: reward`).
With a teacher (`algorithm.teacher`): kl_teacher, mean k1 (log pi - log teacher) of the policy at the start of the step, nats, which is what is
brought down; teacher_bounded_fraction (share of trained tokens); rows_scored, rows_dropped_unscored, tokens_dropped_unscored, teacher_retries,
seconds_teacher; no group is without signal then, and advantage_mean, _std, _max are of the rewards' part.
A mean or a maximum over no token is left out: all of them in a step without an update, those of the current version's tokens where all are older.
Learner against engine, on tokens made by the current version: tokens_current, max_logprob_diff (nats), engine_kl (mean k3, nats). Of all
trained tokens, so that the policy's way since an older version is in them: max_logprob_diff_all, engine_kl_all.
With an adapter per role also max_logprob_diff.ROLE, tokens_trained.ROLE and grad_norm.ROLE (before its own clipping; grad_norm is of all of
them together) of the roles that had rows.
max_token_age: weight versions between a token and this step; token_age.AGE: trained tokens of that age, token_age_mean. Counts: tokens_trained, tokens_forward (their context included),
tokens_shared (of the rows, but not run forward: `trajectory.rows: tree` runs a beginning that rows share once), tokens_repeated (run forward more
than once in an update: rows that begin alike without `tree`, or with it in other micro-batches or on other ranks),
tokens_of_batch (of all kept rows), tokens_made (by all calls; what of them is not in tokens_of_batch is in tokens_dropped_failed, _greedy,
_constrained, _frozen, _unrewarded, _overlong), tokens_merged (context tokens that calls share and rows therefore hold once), rows, rows_truncated,
rows_dropped_overlong, rows_dropped_empty, groups, zero_signal_groups (no unit of them has an advantage but 0), units (of credit),
unit_groups, zero_signal_unit_groups, rollouts, rollouts_without_calls, rollouts_without_reward (a dimension that counts is missing),
rewards_of_parts, rewards_unplaced (of parts without a call), calls, calls_failed, calls_greedy, calls_constrained, calls_frozen, branches, retokenized_tokens
(of all calls). reward_of.DIMENSION: mean over the rollouts that have it; reward_role.ROLE, reward_tag.TAG: mean over the units with a call of that
role, of that tag. With `algorithm.overlong_tokens`: overlong_penalty (mean of what was taken off a unit's reward; the metrics of rewards are of those before
it) and overlong_share (of the units, how many lost some). advantage_mean, advantage_std, advantage_max (of the absolute ones): over all units.
With a critic (learner/critic.py): value_mean and return_mean (over the trained tokens of the whole batch, before the critic's updates), explained_variance
(1 - Var(return - value) / Var(return)), value_loss (mean over the critic's updates, critic_updates of them, at critic_lr), value_clip_fraction (share of
tokens whose clipped value counts), critic_grad_norm (before clipping); advantages are then of tokens, no group is without signal, and
kl_penalty is the mean over the episodes.
Seconds: seconds_read (spans from the store), seconds_layout (rows, packing), seconds_old_logprobs, seconds_reference, seconds_values and
seconds_critic (with a critic), seconds_choice (of tokens by the losses clip_cov and kl_cov), seconds_forward_backward, seconds_optimizer,
seconds_train (the last seven and the rest of `train`).
"""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Learner:
    """One rank's model and optimiser. With `world_size` above 1 or `config.cpu_offload` the ranks' group (fsdp.join_group) must be joined before.

    base: where files that `algorithm` names are looked up too. roles: those with an adapter of their own (`RunConfig.adapters`).
    steps: of the whole run, over which `config.schedule` lets the rate fall. share: of the highest rate, in the last step.
    version: the weight version that it holds; 0 is the base model.
    updates: optimiser updates so far. critic: None where the algorithm needs none. kept: what the advantage function keeps from step to step, as of this version.
    """

    def __init__(
        self,
        algorithm: AlgorithmConfig,
        config: LearnerConfig,
        model_path: str | Path,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: str = "cpu",
        base: Path | None = None,
        roles: Sequence[str] = (),
        steps: int | None = None,
    ) -> None:
        self.config, self.rank, self.world_size = config, rank, world_size
        self.steps, self.share = steps, optim.share_at(config, 0, steps)
        self.algorithm = make_algorithm(algorithm, base)
        self.model_path = Path(model_path)
        self.dtype = DTYPES[config.dtype]
        torch.manual_seed(seed + rank)
        offload = config.cpu_offload
        self.model = load_model(model_path, fsdp.loading_device(device, offload))
        if config.lora is not None:
            lora.add_adapters(self.model, config.lora, seed, roles)
        if config.gradient_checkpointing:
            recompute_layers(self.model)
        if world_size > 1 or offload:
            fsdp.shard(self.model, self.dtype, device, offload)
        self.reference = make_reference(
            algorithm.kl,
            self.model,
            self.model_path,
            base,
            self.dtype,
            world_size=world_size,
            device=device,
            offload=offload,
        )
        self.optimizer = optim.make_optimizer(self.model, config, config.optimizer)
        self.critic = None
        if not self.algorithm.needs_critic and config.critic != type(config.critic)():
            raise ConfigError(
                f"learner.critic acts with a critic's advantage only, and algorithm.advantage is {algorithm.advantage!r}; leave it out"
            )
        if self.algorithm.needs_critic:
            self.critic = Critic(
                config, self.algorithm, model_path, self.dtype, world_size=world_size, device=device
            )
        self.version = 0
        self.updates = 0
        self.kept: dict[str, float] = {}

    @property
    def num_parameters(self) -> int:
        """Of the whole model, over all ranks."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    # --- one step ------------------------------------------------------------------------------

    def train(self, payload: Payload) -> dict[str, float]:
        """Version k to version k + 1. Returns the step's metrics, those of METRICS; equal on all ranks but for `seconds_*`.

        RunError where the payload is not for the next version. A batch without any signal changes no parameter and makes a version all the same.
        """
        if payload.step != self.version + 1:
            raise RunError(
                f"training step {payload.step}: expected step {self.version + 1}, since the learner holds weight version "
                f"{self.version}; load the checkpoint that belongs to the run's position"
            )
        totals = _Totals(fsdp.device_of(self.model))
        self.share = optim.share_at(self.config, self.version, self.steps)
        known = self._known(payload, totals)
        of_critic: dict[str, float] = {}
        if self.critic is not None:
            payload, of_critic = self.critic.step(payload, known, totals.timed, self.share)
        elif payload.units is not None:
            penalty = penalties(payload, known, self.algorithm.config.kl)
            payload = with_advantages(payload, penalty, self.algorithm)
        # The critic leaves no update while it learns alone.
        for update, streams in zip(payload.updates, known[: len(payload.updates)], strict=True):
            self._update(update, streams, totals)
        self.version += 1
        self.kept = dict(payload.kept)
        made = totals.metrics(len(payload.updates))
        return {**payload.stats, **made, **of_critic, "lr": self.lr}

    @property
    def lr(self) -> float:
        """The rate of the last step's last update; where it made none, of the last one before it (of the first one before any) by this step's share."""
        return optim.learning_rate(self.config, max(0, self.updates - 1), self.share)

    @torch.no_grad()
    def _known(self, payload: Payload, totals: _Totals) -> Known:
        """log pi_old and the reference's log-probabilities. The first, with a single update, is that update's own forward pass, unless it
        is needed before."""
        known: Known = [[{} for _ in update.micros] for update in payload.updates]
        work = [
            (micro, streams)
            for update, of_update in zip(payload.updates, known, strict=True)
            for micro, streams in zip(update.micros, of_update, strict=True)
        ]
        if len(payload.updates) > 1 or self.algorithm.late_advantages:
            with totals.timed("old_logprobs"):
                for micro, streams in work:
                    streams["old_logprobs"] = self._outputs(micro).logprobs
        if self.reference is not None:
            with totals.timed("reference"):
                for micro, streams in work:
                    streams["reference_logprobs"] = self.reference.logprobs(micro)
        return known

    def _outputs(self, micro: Packed, *, entropy: bool = False) -> TokenOutputs:
        lora.act_as(self.model, micro.role)
        with fsdp.compute_in(self.model, self.dtype):
            return token_outputs(self.model, micro, entropy=entropy)

    def _update(
        self, update: Update, known: list[dict[str, torch.Tensor]], totals: _Totals
    ) -> None:
        if self.algorithm.needs_choice:
            with totals.timed("choice"):
                self._choose(update, known)
        with totals.timed("forward_backward"):
            for micro, streams in zip(update.micros, known, strict=True):
                made = self._outputs(micro, entropy=self.algorithm.needs_entropy)
                inputs = self._inputs(micro, made, streams)
                outputs = self.algorithm.loss(inputs)
                # FSDP averages gradients over the ranks; the loss is a sum over them.
                (outputs.loss * self.world_size).backward()
                totals.add({"loss": outputs.loss.detach()}, outputs.sums)
                self._compare(micro, inputs, totals)
        with totals.timed("optimizer"):
            lr = optim.learning_rate(self.config, self.updates, self.share)
            limit = self.config.max_grad_norm
            of = f"training step {self.version + 1}, policy"
            totals.add_norms(optim.apply_gradients(self.model, self.optimizer, lr, limit, of))
            self.updates += 1

    @torch.no_grad()
    def _choose(self, update: Update, known: list[dict[str, torch.Tensor]]) -> None:
        """Adds to `known` which tokens of the update the policy loss acts on, by one more forward pass."""
        inputs = [
            self._inputs(micro, self._outputs(micro), streams)
            for micro, streams in zip(update.micros, known, strict=True)
        ]
        chosen = choose(self.algorithm, update.micros, inputs)
        for streams, of_micro in zip(known, chosen, strict=True):
            streams["chosen"] = of_micro

    def _inputs(
        self, micro: Packed, made: TokenOutputs, known: dict[str, torch.Tensor]
    ) -> LossInputs:
        device = made.logprobs.device
        teacher = micro.columns.get("teacher_logprobs")
        inputs = LossInputs(
            logprobs=made.logprobs,
            entropy=made.entropy,
            engine_logprobs=torch.tensor(micro.columns["engine_logprobs"], device=device),
            advantages=torch.tensor(micro.columns["advantages"], device=device),
            weights=torch.tensor(micro.weights, device=device),
            scale=torch.tensor(micro.columns["scale"], device=device),
            sequence=torch.from_numpy(micro.row_of_token).to(device),
            num_sequences=len(micro.lengths),
            teacher_logprobs=None if teacher is None else torch.tensor(teacher, device=device),
            **{"old_logprobs": made.logprobs.detach(), **known},
        )
        return self.algorithm.with_teacher(inputs)

    @torch.no_grad()
    def _compare(self, micro: Packed, inputs: LossInputs, totals: _Totals) -> None:
        """Learner and engine on the same tokens under the same weights: the health of the whole chain. And how far the policy has moved."""
        counted = inputs.weights
        versions = torch.tensor(micro.columns["versions"], device=counted.device)
        current = counted * (versions == self.version)
        difference = inputs.old_logprobs - inputs.engine_logprobs  # log pi_old - log mu
        engine_kl = estimate(inputs.engine_logprobs, inputs.old_logprobs, "k3")
        moved = estimate(inputs.old_logprobs, inputs.logprobs, "k3")
        totals.add(
            {
                "tokens_trained": counted.sum(),
                "tokens_current": current.sum(),
                "entropy": -(counted * inputs.old_logprobs).sum(),
                "kl_old": (counted * moved).sum(),
                "engine_kl": torch.where(current > 0, engine_kl, 0.0).sum(),
                "engine_kl_all": torch.where(counted > 0, engine_kl, 0.0).sum(),
            }
        )
        if inputs.reference_logprobs is not None:
            away = estimate(inputs.old_logprobs, inputs.reference_logprobs, "k3")
            totals.add({}, {"kl_reference": (counted * away).sum()})
        marks = self.algorithm.teacher_marks(inputs)
        totals.add({}, {name: (counted * mark).sum() for name, mark in marks.items()})
        largest = torch.where(current > 0, difference.abs(), UNSEEN).max()
        of_all = torch.where(counted > 0, difference.abs(), UNSEEN).max()
        age = torch.where(counted > 0, self.version - versions, UNSEEN).max()
        totals.keep_largest(
            {"max_logprob_diff": largest, "max_logprob_diff_all": of_all, "max_token_age": age}
        )
        if micro.role is not None:
            totals.add({f"tokens_trained.{micro.role}": counted.sum()})
            totals.keep_largest({f"max_logprob_diff.{micro.role}": largest})

    # --- state ---------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a checkpoint (all ranks)."""
        position = {"version": self.version, "updates": self.updates, "kept": self.kept}
        if self.critic is not None:
            position["critic_updates"] = self.critic.updates
        checkpoint.save(path, self.model, self.optimizer, position, self._critic_part())

    def load(self, path: str | Path) -> None:
        """Go to the state of a checkpoint (all ranks)."""
        position = checkpoint.load(path, self.model, self.optimizer, self._critic_part())
        if self.critic is not None:
            self.critic.updates = position["critic_updates"]
        self.version, self.updates = position["version"], position["updates"]
        self.kept = position["kept"]

    def _critic_part(self) -> checkpoint.Part | None:
        return None if self.critic is None else (self.critic.model, self.critic.optimizer)

    def export(self, path: str | Path) -> None:
        """Write a Hugging Face folder (all ranks)."""
        export(self.model, self.model_path, path, write=self.rank == 0)
        fsdp.barrier()

    def full_state(self) -> list[tuple[str, torch.Tensor]]:
        """What the engines are sent, on rank 0, [] on the others (all ranks call it); see weights.delivered."""
        return delivered(self.model, keep=self.rank == 0)


class _Totals:
    """Sums, maxima and phase times of one step, kept on the device until the end, then added over the ranks at once."""

    PER_TOKEN = frozenset({"entropy", "kl_old", "engine_kl_all"})

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: defaultdict[str, torch.Tensor] = defaultdict(self._zero)
        self.maxima: defaultdict[str, torch.Tensor] = defaultdict(lambda: self._zero() + UNSEEN)
        self.norms: defaultdict[str | None, list[torch.Tensor]] = defaultdict(list)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.per_token: set[str] = set(self.PER_TOKEN)
        self.started = time.perf_counter()

    def _zero(self) -> torch.Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.device)

    def add(
        self, sums: dict[str, torch.Tensor], per_token: dict[str, torch.Tensor] | None = None
    ) -> None:
        for name, value in {**sums, **(per_token or {})}.items():
            self.sums[name] += value
        self.per_token.update(per_token or ())

    def keep_largest(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self.maxima[name] = torch.maximum(self.maxima[name], value.double())

    def add_norms(self, norms: Mapping[str | None, torch.Tensor]) -> None:
        """Of one update: of all that is trained, or of each role's adapter; a role without a gradient has none."""
        for role, norm in norms.items():
            if role is not None and norm:
                self.norms[role].append(norm)
        everything = torch.stack([norm.to(self.device) for norm in norms.values()])
        self.norms[None].append(torch.linalg.vector_norm(everything))

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the seconds of the block to `phase`; on CUDA the kernels of the block included."""
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[phase] += time.perf_counter() - started

    def metrics(self, updates: int) -> dict[str, float]:
        """Means over tokens (or over updates), equal on all ranks. A mean or a maximum over no token at all is left out."""
        for name in ("loss", "tokens_trained", "tokens_current"):
            _ = self.sums[name]
        over = dict.fromkeys(self.per_token, "tokens_trained") | {"engine_kl": "tokens_current"}
        maxima = _over_ranks(self.maxima, largest=True)
        made = said(_over_ranks(self.sums), maxima, over)
        made["loss"] /= max(1, updates)
        norms = {
            "grad_norm" if role is None else f"grad_norm.{role}": float(torch.stack(of).mean())
            for role, of in self.norms.items()
        }
        seconds = {f"seconds_{phase}": value for phase, value in self.seconds.items()}
        seconds["seconds_train"] = time.perf_counter() - self.started
        return {"grad_norm": 0.0, **made, **norms, "updates": float(updates), **seconds}


def _over_ranks(values: dict[str, torch.Tensor], largest: bool = False) -> dict[str, float]:
    if not values:
        return {}
    names = sorted(values)
    stacked = fsdp.add_over_ranks(torch.stack([values[name] for name in names]), largest)
    return dict(zip(names, stacked.tolist(), strict=True))
