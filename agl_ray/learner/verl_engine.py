"""The learner of one rank with verl inside: verl's FSDP2 engine, its policy losses and its checkpoints. `learner.backend: verl`.

verl loads and shards the model, runs it, takes the loss, clips, steps, gathers and saves; ours are the rows, the advantages, the weight of a
token for the learner/engine mismatch (`algorithm.correction`, given to verl's losses as `rollout_is_weights`), the learning rate (verl's warm-up
makes its first update at rate 0) and the metrics' names. Denominators are verl's: of the rows of an update, where ours are of the whole batch, which with
learner.minibatches 1 is the same. The one file of the house that drives verl, with verl_rows.py and verl_platform.py (tested with verl
0.9.1 on CPU over Gloo); it runs in verl's environment, and imports verl inside functions only. Called by learner/backend.py. Test it with
`make test-verl`. Legend: N tokens of this rank's rows of one update.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from agl_ray.algorithms.algorithm import make_algorithm
from agl_ray.algorithms.base import LossInputs
from agl_ray.algorithms.correction import correction
from agl_ray.config.verl import LOSSES
from agl_ray.learner import fsdp, optim
from agl_ray.learner.export import copy_tokenizer, new_partial, put_in_place, save_tensors
from agl_ray.learner.model import check_model_folder
from agl_ray.learner.verl_metrics import StepTotals
from agl_ray.learner.verl_rows import VerlRows, gather_rows, tensordict_of, token_values
from agl_ray.types.errors import ConfigError, InputError, RunError

if TYPE_CHECKING:
    from agl_ray.config.algorithm import AlgorithmConfig
    from agl_ray.config.models import LearnerConfig
    from agl_ray.learner.prepare import Payload, Update

POSITION = "position.json"
NO_DUAL_CLIP = 1e9
"""verl's vanilla loss always has the bound on ratio * |A|, and never lets a ratio above e^20: no token meets this one."""
PRECISION = {"float32": "fp32", "bfloat16": "bf16"}


class VerlLearner:
    """As learner/backend.py's Backend. The ranks' group (fsdp.join_group) must be joined before, also that of one rank."""

    def __init__(
        self,
        algorithm: AlgorithmConfig,
        config: LearnerConfig,
        model_path: str | Path,
        *,
        rank: int,
        device: str = "cpu",
        base: Path | None = None,
        steps: int | None = None,
    ) -> None:
        self.config, self.rank, self.device = config, rank, device
        self.steps, self.share = steps, optim.share_at(config, 0, steps)
        self.world_size = config.world_size
        self.algorithm = make_algorithm(algorithm, base)
        if self.algorithm.needs_critic:
            raise ConfigError(
                f"algorithm.advantage {algorithm.advantage} needs a critic, and learner.backend verl trains none; say learner.backend: native"
            )
        # verl takes its denominators from the rows that it is given: those of advantage 0 must be among them.
        self.algorithm.skip_zero_advantage = False
        self.model_path = check_model_folder(model_path)
        if device == "cpu":
            from agl_ray.learner.verl_platform import use_cpu

            use_cpu()
        self.engine = _make_engine(config, self.model_path)
        self.loss = _make_loss(algorithm)
        self.version = 0
        self.updates = 0
        self.kept: dict[str, float] = {}

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.engine.module.parameters())

    # --- one step ------------------------------------------------------------------------------

    def train(self, payload: Payload) -> dict[str, float]:
        """Version k to version k + 1. RunError where the payload is not for the next version, or a gradient norm is not finite."""
        if payload.step != self.version + 1:
            raise RunError(
                f"training step {payload.step}: expected step {self.version + 1}, since the learner holds weight version "
                f"{self.version}; load the checkpoint that belongs to the run's position"
            )
        self.share = optim.share_at(self.config, self.version, self.steps)
        totals = StepTotals(self.world_size, self.device)
        work = []
        with totals.timed("old_logprobs"):
            for update in payload.updates:
                rows = self._rows(update)
                work.append((rows, self._logprobs(rows)))
        for rows, old in work:
            self._update(rows, old, totals)
        self.version += 1
        self.kept = dict(payload.kept)
        lr = optim.learning_rate(self.config, max(0, self.updates - 1), self.share)
        return {**payload.stats, **totals.metrics(len(work)), "lr": lr}

    def _rows(self, update: Update) -> VerlRows:
        """As many on every rank; a collective."""
        own = sum(len(micro.lengths) for micro in update.micros)
        most = fsdp.add_over_ranks(torch.tensor([own], device=self.device), largest=True)
        return gather_rows(update.micros, int(most))

    def _settings(self, rows: VerlRows) -> dict[str, Any]:
        """verl's switches of a batch. A collective."""
        trained = torch.tensor([rows.num_trained_rows], device=self.device)
        return {
            "use_remove_padding": False,
            "use_dynamic_bsz": True,
            # The same on every rank and at least the longest row, or verl gives up.
            "max_token_len_per_gpu": max(
                self.config.tokens_per_microbatch, self.config.max_row_tokens
            ),
            "global_batch_size": int(fsdp.add_over_ranks(trained)),
            "calculate_entropy": self.algorithm.needs_entropy,
            "return_model_output": True,
        }

    def _logprobs(self, rows: VerlRows) -> torch.Tensor:
        """float32 [N]: log pi of the trained tokens, as of now."""
        settings = {**self._settings(rows), "calculate_entropy": False}
        with self.engine.eval_mode():
            output = self.engine.infer_batch(tensordict_of(rows, {}, settings))
        return token_values(output["model_output"]["log_probs"], rows)

    def _update(self, rows: VerlRows, old: torch.Tensor, totals: StepTotals) -> None:
        seen = self.algorithm.seen(_inputs(rows, old, old, None))
        weight, cut = correction(seen, self.algorithm.config)
        streams = {
            "old_log_probs": seen.old_logprobs,
            "advantages": seen.advantages,
            "rollout_is_weights": weight,
        }
        batch = tensordict_of(rows, streams, self._settings(rows))
        for group in self.engine.optimizer.param_groups:
            group["lr"] = optim.learning_rate(self.config, self.updates, self.share)
        with totals.timed("forward_backward"), self.engine.train_mode():
            output = self.engine.train_batch(batch, self.loss)
        totals.add_update(output, f"training step {self.version + 1}, policy")
        self.updates += 1
        said = output["model_output"]
        now = token_values(said["log_probs"], rows)
        entropy = token_values(said["entropy"], rows) if "entropy" in said else None
        versions = torch.from_numpy(rows.columns["versions"])
        totals.add_tokens(_inputs(rows, now, old, entropy), versions, self.version)
        totals.add_ratio(now - seen.old_logprobs, seen.weights, cut)

    # --- state ---------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """verl's own checkpoint of every rank, and our position beside it. Only as many ranks of verl as wrote it can read it."""
        target = Path(path)
        partial = target.with_name(f".{target.name}.partial")
        if self.rank == 0:
            new_partial(target)
        fsdp.barrier()
        self.engine.save_checkpoint(local_path=str(partial), global_step=self.version)
        if self.rank == 0:
            position = {
                "version": self.version,
                "updates": self.updates,
                "kept": self.kept,
                "backend": "verl",
                "world_size": self.world_size,
            }
            (partial / POSITION).write_text(json.dumps(position))
            put_in_place(partial, target)
        fsdp.barrier()

    def load(self, path: str | Path) -> None:
        """Go to the state of a checkpoint. InputError where it is of our own learner, or of another number of ranks."""
        folder = Path(path)
        if not (folder / POSITION).is_file():
            raise InputError(
                f"checkpoint {folder}: expected a folder with {POSITION}, found none; it is not a checkpoint, or its saving was interrupted"
            )
        position = json.loads((folder / POSITION).read_text())
        written = (position.get("backend", "native"), position.get("world_size"))
        if written != ("verl", self.world_size):
            raise InputError(
                f"checkpoint {folder}: expected one of learner.backend verl with learner.world_size {self.world_size}, got backend {written[0]}, "
                f"world_size {written[1] or 'any'}; resume with what wrote it"
            )
        self.engine.load_checkpoint(local_path=str(folder), del_local_after_load=False)
        self.version, self.updates = position["version"], position["updates"]
        self.kept = position["kept"]

    def full_state(self) -> list[tuple[str, torch.Tensor]]:
        """The whole weights, float32 on the CPU, on rank 0; [] on the others. A tied head is left out, as in a checkpoint."""
        module = self.engine.module
        tied: set[str] = set()
        if module.config.tie_word_embeddings:
            tied = set(module._tied_weights_keys or ())
        named, _ = self.engine.get_per_tensor_param()
        state = []
        for name, tensor in named:
            if self.rank == 0 and name not in tied:
                whole = tensor.detach().to("cpu", torch.float32, copy=True)
                state.append((name, whole.contiguous()))
        return state

    def export(self, path: str | Path) -> None:
        """A Hugging Face folder: the base model's configuration and tokenizer byte for byte, these weights."""
        state = dict(self.full_state())
        if self.rank == 0:
            target = Path(path)
            partial = new_partial(target)
            copy_tokenizer(self.model_path, partial)
            shutil.copyfile(self.model_path / "config.json", partial / "config.json")
            save_tensors(state, partial)
            put_in_place(partial, target)
        fsdp.barrier()


def _inputs(
    rows: VerlRows, logprobs: torch.Tensor, old: torch.Tensor, entropy: torch.Tensor | None
) -> LossInputs:
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=old,
        engine_logprobs=torch.from_numpy(rows.columns["engine_logprobs"]),
        entropy=entropy,
        advantages=torch.from_numpy(rows.columns["advantages"]),
        weights=torch.from_numpy(rows.weights),
        scale=torch.from_numpy(rows.columns["scale"]),
        sequence=torch.from_numpy(rows.row_of_token),
        num_sequences=len(rows.lengths),
    )


def _make_engine(config: LearnerConfig, model_path: Path) -> Any:
    """verl's engine, with the model loaded and sharded."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine import EngineRegistry

    precision = PRECISION[config.dtype]
    engine = EngineRegistry.new(
        "language_model",
        "fsdp2",
        HFModelConfig(
            path=str(model_path),
            # flash-attn has no CPU kernels. The special tokens are the model's own: verl would make eos the padding token of a tokenizer that
            # has none, and the embedding of a padding token gets no gradient.
            override_config={"attn_implementation": "sdpa", **_special_tokens(model_path)},
            use_remove_padding=False,
            enable_gradient_checkpointing=config.gradient_checkpointing,
        ),
        FSDPEngineConfig(
            strategy="fsdp2",
            mixed_precision={
                "param_dtype": precision,
                "reduce_dtype": "fp32",
                "buffer_dtype": "fp32",
            },
            use_remove_padding=False,
            use_torch_compile=False,
        ),
        FSDPOptimizerConfig(
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            clip_grad=config.max_grad_norm,
            total_training_steps=1,  # of verl's schedule, which is constant here
        ),
        CheckpointConfig(),
    )
    engine.initialize()
    return engine


def _special_tokens(model_path: Path) -> dict[str, Any]:
    config = json.loads((model_path / "config.json").read_text())
    return {name: config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _make_loss(algorithm: AlgorithmConfig) -> Any:
    """verl's ppo_loss with the policy loss, the aggregation and the switches of our section."""
    from verl.workers.config import ActorConfig
    from verl.workers.config.actor import PolicyLossConfig
    from verl.workers.utils.losses import ppo_loss

    norm = algorithm.norm_tokens if algorithm.aggregation.endswith("-norm") else None
    config = ActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        use_dynamic_bsz=True,
        policy_loss=PolicyLossConfig(loss_mode=LOSSES[algorithm.loss]),
        clip_ratio_low=algorithm.clip_low,
        clip_ratio_high=algorithm.clip_high,
        clip_ratio_c=algorithm.dual_clip or NO_DUAL_CLIP,
        loss_agg_mode=algorithm.aggregation,
        loss_scale_factor=norm,
        entropy_coeff=algorithm.entropy_coefficient,
        tau_pos=algorithm.sapo_tau_positive,
        tau_neg=algorithm.sapo_tau_negative,
    )
    return partial(ppo_loss, config)
