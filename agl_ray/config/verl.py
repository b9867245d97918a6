"""What a run with `learner.backend: verl` may say: verl's engine and losses do not do everything that ours do, and what they do not is refused.

Called by agl_ray/config/models.py and, for the folder of verl's environment, by agl_ray/trainer.py. Test alone: tests/unit/test_config_verl.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from agl_ray.config.algorithm import AlgorithmConfig
from agl_ray.config.paths import find, looked_in
from agl_ray.config.section import Section
from agl_ray.types.errors import ConfigError

if TYPE_CHECKING:
    from agl_ray.config.models import LearnerConfig, RunConfig

LOSSES = {"clip": "vanilla", "gspo": "gspo", "cispo": "cispo", "sapo": "sapo"}
"""`algorithm.loss` -> the policy loss of that name in verl.trainer.ppo.core_algos. Its others are not here: geo_mean averages over the rows of a
micro-batch, clip_cov and kl_cov choose tokens of one micro-batch, dppo_* take the sampling policy for the old one."""

TAKEN_OF_LEARNER = frozenset(
    [
        "backend",
        "verl_env",
        "world_size",
        "lr",
        "warmup_steps",
        "schedule",
        "final_lr_share",
        "weight_decay",
        "betas",
        "max_grad_norm",
        "minibatches",
        "tokens_per_microbatch",
        "max_row_tokens",
        "dtype",
        "gradient_checkpointing",
        "num_cpus",
        "num_gpus",
        "step_timeout_seconds",
    ]
)
TAKEN_OF_ALGORITHM = frozenset(
    [
        "name",
        "imports",
        "advantage",
        "normalize",
        "zero_signal",
        "refill_batches",
        "overlong_tokens",
        "overlong_buffer",
        "overlong_factor",
        "rae_decay",
        "gigpo_gamma",
        "gigpo_weight",
        "loss",
        "aggregation",
        "unit",
        "norm_tokens",
        "clip_low",
        "clip_high",
        "dual_clip",
        "sapo_tau_positive",
        "sapo_tau_negative",
        "entropy_coefficient",
        "proximal",
        "correction",
        "tis_cap",
        "icepop_low",
        "icepop_high",
        "geometric_band",
    ]
)
"""The fields that have their meaning with verl too. Any other must be left at its default."""


def check_verl(config: RunConfig) -> None:
    """ValueError names the first field that `learner.backend: verl` cannot do, or that only it reads where it is not chosen."""
    learner, algorithm = config.learner, config.algorithm
    if learner.backend != "verl":
        if _changed(learner, "verl_env"):
            raise ValueError("learner.verl_env acts with learner.backend: verl only; leave it out")
        return
    for section, name, taken in (
        (learner, "learner", TAKEN_OF_LEARNER),
        (algorithm, "algorithm", TAKEN_OF_ALGORITHM),
    ):
        for field in type(section).model_fields:
            if field not in taken and _changed(section, field):
                raise ValueError(
                    f"{name}.{field}: learner.backend verl does not do it; leave it out, or say learner.backend: native"
                )
    if config.trajectory.rows == "tree":
        raise ValueError(
            "trajectory.rows tree: verl's engine runs every row by itself; with learner.backend verl say merge-prefix or per-call"
        )
    if algorithm.advantage == "gae":
        raise ValueError(
            "algorithm.advantage gae needs a critic, and learner.backend verl trains none; say learner.backend: native"
        )
    _check_loss(algorithm)


def _check_loss(algorithm: AlgorithmConfig) -> None:
    if algorithm.loss not in LOSSES:
        raise ValueError(
            f"algorithm.loss {algorithm.loss}: learner.backend verl has {', '.join(sorted(LOSSES))}; choose one of them, or say "
            "learner.backend: native"
        )
    if algorithm.loss == "sapo" and algorithm.aggregation != "seq-mean-token-mean":
        raise ValueError(
            f"algorithm.aggregation {algorithm.aggregation}: verl's sapo always takes seq-mean-token-mean; say that, or learner.backend: native"
        )
    if algorithm.aggregation.startswith("seq-") and algorithm.unit != "row":
        raise ValueError(
            f"algorithm.unit {algorithm.unit}: for verl a sequence is a row; with learner.backend verl and aggregation {algorithm.aggregation} say "
            "unit: row"
        )


def _changed(section: Section, field: str) -> bool:
    default: object = type(section).model_fields[field].get_default(call_default_factory=True)
    given: object = getattr(section, field)
    return given != default


def located_environment(learner: LearnerConfig, base: Path) -> LearnerConfig:
    """With the folder of verl's environment as it is found from anywhere; as it is where another backend computes. ConfigError where a relative
    folder is nowhere (an absolute one may be on the learner's nodes alone). base: folder of the configuration file."""
    if learner.backend != "verl" or Path(learner.verl_env).expanduser().is_absolute():
        return learner
    folder = find(learner.verl_env, base)
    if folder is None:
        raise ConfigError(
            f"learner.verl_env: expected the folder of a Python environment with verl, found no {learner.verl_env}; "
            f"{looked_in(learner.verl_env, base)}. Make it with `make venv-verl`"
        )
    return learner.model_copy(update={"verl_env": str(folder)})
