"""The section `algorithm` of the configuration: independent switches, and the names of papers as presets for them.

`name` fills every switch that is not given; whatever is given wins, so that `name: grpo` with `aggregation: seq-mean-token-mean`
means what it says. The switches themselves are in agl_ray/algorithms, one file each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from agl_ray.config.kl import KLConfig, reference_folder
from agl_ray.config.section import Fraction, PositiveFloat, Section
from agl_ray.config.teacher import TeacherConfig

Aggregation = Literal[
    "token-mean",
    "token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
]

Correction = Literal["none", "importance", "tis", "icepop", "seq-tis", "seq-mask", "geometric-mask"]

PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"clip_high": 0.2, "aggregation": "seq-mean-token-sum-norm"},
    "dapo": {"normalize": "group", "zero_signal": "refill"},
    "rloo": {"advantage": "rloo"},
    "reinforce_pp": {"advantage": "reward", "normalize": "batch", "clip_high": 0.2},
    "reinforce_pp_baseline": {"advantage": "group", "normalize": "batch", "clip_high": 0.2},
    "lite_ppo": {"advantage": "group", "normalize": "batch"},
    "opo": {"advantage": "opo"},
    "decoupled_ppo": {"correction": "importance", "clip_high": 0.2},
    "ppo": {"advantage": "gae", "normalize": "batch", "clip_high": 0.2},
    "maxrl": {"advantage": "maxrl"},
    "gspo": {
        "normalize": "group",
        "loss": "gspo",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "aggregation": "seq-mean-token-mean",
    },
    "gmpo": {
        "normalize": "group",
        "loss": "gmpo",
        "clip_low": 0.4,
        "clip_high": 0.4,
        "aggregation": "seq-mean-token-mean",
    },
    "cispo": {"normalize": "group", "loss": "cispo", "clip_low": 1.0, "clip_high": 4.0},
    "sapo": {"normalize": "group", "loss": "sapo", "aggregation": "seq-mean-token-mean"},
    "clip_cov": {"normalize": "group", "loss": "clip_cov"},
    "kl_cov": {"normalize": "group", "loss": "kl_cov"},
    "dppo": {"loss": "dppo", "correction": "none"},
    "topr": {"loss": "topr", "correction": "none"},
    "opd": {"advantage": "none"},
}
"""What a name stands for, beside the defaults of AlgorithmConfig. Papers: see the files in agl_ray/algorithms."""


class AlgorithmConfig(Section):
    name: str = "grpo"
    """A preset: grpo, dr_grpo, dapo, rloo, reinforce_pp, reinforce_pp_baseline, lite_ppo, opo, decoupled_ppo, ppo, maxrl, gspo, gmpo, cispo, sapo, clip_cov, kl_cov, dppo, topr, opd."""
    imports: list[str] = []
    """Files (`path/file.py`) or modules that register functions with `@agl.advantage` and `@agl.policy_loss`, to be named below."""
    advantage: str = "group"
    """Advantage of a unit (`credit.unit`) from the rewards of its group: group (minus the mean), rloo (minus the mean of the others), maxrl, opo
    (length-weighted baseline), rae (minus what its role got so far; `credit.unit: role`), gigpo (by rollout and by
    state; `credit.unit: call`), gae (of every token, from a critic, `learner.critic`), reward (no baseline), none (0: what is learnt
    comes from `teacher` or from `kl`), a name registered with `@agl.advantage`, or `file.py:function`."""
    normalize: Literal["none", "group", "batch"] = "none"
    """Divide the advantage by the group's standard deviation (the original GRPO), or whiten it over the whole batch (REINFORCE++, PPO): over
    its units, with gae over its trained tokens."""
    zero_signal: Literal["keep", "refill"] = "keep"
    """A row whose rollouts all got the same reward teaches nothing. keep: its group stays in the batch, where it counts in the denominators;
    refill (DAPO's dynamic sampling): it leaves the batch, and a further row is sampled in its place. Refill needs a group's advantages to be
    known from its rollouts' rewards: `credit` at its defaults, an advantage whose baseline is the group's, `normalize` not batch. The rewards are
    those before `overlong_tokens`, as in the paper."""
    refill_batches: PositiveFloat = 4.0
    """zero_signal refill: most further groups of one step, in batches (times `rollout.groups_per_step`). When they are used up, the step goes on
    with the groups that have signal, and a notice says so."""
    rae_decay: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Advantage rae: how much of a role's baseline is left after a reward."""
    gigpo_gamma: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Advantage gigpo: discount of rewards that come in later calls."""
    gigpo_weight: PositiveFloat = 1.0
    """Advantage gigpo: weight of the advantage among equal states."""
    gae_gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Advantage gae: discount per trained token. 1: a reward is worth the same however many tokens lie before it."""
    gae_lambda: Fraction = 1.0
    """Advantage gae: 1 waits for the rewards (no bias from a poor critic, more noise), 0 trusts the next token's value."""
    gae_return_lambda: Fraction | None = None
    """Advantage gae: the same for the returns that the critic learns (1 in 2503.01491). None = `gae_lambda`."""
    gae_over: Literal["unit", "rollout"] = "unit"
    """Advantage gae: what an episode is. unit: a unit of credit (`credit.unit`); rollout: all units of a rollout, in the order of their calls, each
    reward at the last token of its unit (`credit.unit` call or role, `credit.outcome` last or none)."""
    overlong_tokens: Annotated[int, Field(gt=0)] | None = None
    """Soft overlong punishment (DAPO): the length, in tokens that the policy sampled in a unit of credit (`credit.unit`), from which its reward loses
    `overlong_factor`. Given together with `overlong_buffer`. None = rewards do not depend on lengths."""
    overlong_buffer: Annotated[int, Field(gt=0)] | None = None
    """The last so many of `overlong_tokens` over which the loss grows from 0 in equal steps: units of at most overlong_tokens - overlong_buffer lose nothing."""
    overlong_factor: PositiveFloat = 1.0
    """What a unit of `overlong_tokens` or more loses; 1 in the paper, for rewards of -1 and 1."""
    loss: str = "clip"
    """Gain of a token: clip (PPO), gspo, gmpo, cispo, sapo, clip_cov, kl_cov, dppo, topr, a name registered with `@agl.policy_loss`, or `file.py:function`."""
    aggregation: Aggregation = "token-mean"
    """How tokens add up to the loss; denominators are of the whole batch, over all ranks and micro-batches."""
    unit: Literal["rollout", "row"] = "rollout"
    """What a sequence is for seq-mean aggregations: a rollout, however many rows it was cut into, or each row by itself."""
    norm_tokens: Annotated[int, Field(gt=0)] = 1024
    """Constant length that seq-mean-token-sum-norm divides by."""
    clip_low: PositiveFloat = 0.2
    """Losses clip, gspo, gmpo, cispo, clip_cov: lower clip of the probability ratio (1 - clip_low). Acts only with several updates per batch (`learner.minibatches`), or
    with `proximal: engine`."""
    clip_high: PositiveFloat = 0.28
    """The same losses: upper clip (1 + clip_high), DAPO's clip-higher."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Losses clip and clip_cov: bound on ratio * |A| where A < 0 (1912.09729, about 3); None = off."""
    sapo_tau_positive: PositiveFloat = 1.0
    """Loss sapo: temperature of the gate where A > 0."""
    sapo_tau_negative: PositiveFloat = 1.05
    """Loss sapo: temperature of the gate where A < 0."""
    cov_share: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """Losses clip_cov and kl_cov: the share of an update's tokens that they act on, at least one token."""
    cov_low: PositiveFloat = 1.0
    """Loss clip_cov: acts on tokens whose covariance of advantage and log-probability is above this."""
    cov_high: PositiveFloat = 5.0
    """Loss clip_cov: and below this."""
    kl_cov_coefficient: PositiveFloat = 1.0
    """Loss kl_cov: weight of |log (pi / pi_old)| of the tokens that it acts on. Acts only with several updates per batch (`learner.minibatches`)."""
    dppo_bound: PositiveFloat = 0.2
    """Loss dppo: |pi - mu| beyond which a token that moves with its advantage is masked."""
    entropy_coefficient: Annotated[float, Field(ge=0)] = 0.0
    """Bonus: times the mean entropy of the whole distributions (not only of the sampled tokens), weighted as the tokens of the loss are; about
    1e-3 where it is used. Above 0 rows without advantage are trained too, and the metric entropy_full is there."""
    proximal: Literal["learner", "engine"] = "learner"
    """What the ratio of the policy loss is taken against. learner: pi_old, the learner's own log-probabilities at the start of the batch, with mu, the
    engine's, in the weight of `correction` (decoupled PPO, 2505.24298); engine: mu itself (PPO as it was before), with `correction: none`."""
    correction: Correction = "icepop"
    """Weight for the learner/engine mismatch k = pi_old / mu: importance k, unbounded (decoupled PPO, 2505.24298); tis min(k, tis_cap); icepop k inside
    the band, else 0; the same over the product of a sequence (seq-tis, seq-mask); geometric-mask keeps a sequence whose mean of log k is
    within `geometric_band`."""
    tis_cap: PositiveFloat = 2.0
    """Cap of tis and seq-tis."""
    icepop_low: PositiveFloat = 0.5
    """Lower end of the band of icepop and seq-mask."""
    icepop_high: PositiveFloat = 5.0
    """Upper end of that band."""
    geometric_band: PositiveFloat = 0.01
    """geometric-mask: a sequence is kept where exp(mean log k) is within 1 +- this."""
    kl: KLConfig = KLConfig()
    teacher: TeacherConfig | None = None
    """On-policy distillation: a teacher's log-probabilities of the student's own tokens are added to the advantages of the rewards. None = no teacher."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        name = given.get("name", "grpo")
        if name not in PRESETS:
            raise ValueError(f"algorithm.name: expected one of {sorted(PRESETS)}, got {name!r}")
        return {**PRESETS[name], **given}

    @model_validator(mode="after")
    def _fits_together(self) -> AlgorithmConfig:
        if self.icepop_low >= self.icepop_high:
            raise ValueError("algorithm.icepop_low must be below algorithm.icepop_high")
        if self.cov_low >= self.cov_high:
            raise ValueError("algorithm.cov_low must be below algorithm.cov_high")
        if self.advantage == "gigpo" and self.normalize == "group":
            raise ValueError(
                "algorithm.normalize group divides by the spread of one group, and gigpo has two baselines; leave it out"
            )
        if self.zero_signal == "refill" and self.normalize == "batch":
            raise ValueError(
                "algorithm.zero_signal refill looks for groups whose advantages are all 0, and normalize batch gives every group others; say "
                "zero_signal: keep"
            )
        if self.zero_signal == "refill" and self.kl.in_reward:
            raise ValueError(
                "algorithm.zero_signal refill knows a group's advantages from its rollouts' rewards alone, and algorithm.kl.where reward changes "
                "them later; use where: loss, or say zero_signal: keep"
            )
        if self.advantage == "maxrl" and self.kl.in_reward:
            raise ValueError(
                "algorithm.kl.where reward makes rewards negative, and advantage maxrl needs rewards of 0 or more; use where: loss"
            )
        if self.advantage == "gae" and self.normalize == "group":
            raise ValueError(
                "algorithm.normalize group divides by the spread of a group, and gae has no groups; say batch or none"
            )
        _check_ratio(self)
        _check_teacher(self)
        _check_overlong(self)
        for field, (switch, values) in _ACTS_WITH.items():
            changed = getattr(self, field) != type(self).model_fields[field].default
            if changed and getattr(self, switch) not in values:
                raise ValueError(
                    f"algorithm.{field} acts with {switch}: {' or '.join(values)} only, and {switch} is "
                    f"{getattr(self, switch)!r}; leave it out"
                )
        return self


def _check_ratio(config: AlgorithmConfig) -> None:
    """ValueError where the weight of a token and the ratio of the loss would hold the engine's probabilities twice."""
    if config.proximal == "engine" and config.correction != "none":
        raise ValueError(
            "algorithm.proximal engine takes the ratio against the engine's own probabilities, so that nothing is left for "
            f"algorithm.correction {config.correction} to weigh; say correction: none"
        )
    if config.loss not in ("dppo", "topr"):  # the others know pi_old
        return
    if config.proximal == "engine" or config.correction == "importance":
        switch = "proximal engine" if config.proximal == "engine" else "correction importance"
        raise ValueError(
            f"algorithm.{switch}: algorithm.loss {config.loss} takes its ratio against the engine's probabilities by itself; leave it out"
        )


def _check_teacher(config: AlgorithmConfig) -> None:
    """ValueError where rewards would act and are said not to, nothing would be learnt, or a teacher's signal is overlooked."""
    if config.teacher is not None and config.zero_signal == "refill":
        raise ValueError(
            "algorithm.zero_signal refill looks for groups that teach nothing, and with algorithm.teacher every group teaches something; say "
            "zero_signal: keep"
        )
    if config.advantage != "none":
        return
    if config.teacher is None and not config.kl.in_loss:
        raise ValueError(
            "algorithm.advantage none takes nothing from the rewards, so that nothing would be learnt; give algorithm.teacher (name: opd), "
            "algorithm.kl.coefficient, or another advantage"
        )
    if config.kl.in_reward or config.normalize != "none":
        field = "kl.where reward" if config.kl.in_reward else f"normalize {config.normalize}"
        raise ValueError(
            f"algorithm.{field} has no effect with advantage none, which takes nothing from the rewards; leave it out"
        )


def _check_overlong(config: AlgorithmConfig) -> None:
    """ValueError where only a part of the punishment is given, it would leave nobody unpunished, or nothing could come of it."""
    longest, buffer = config.overlong_tokens, config.overlong_buffer
    if longest is None or buffer is None:
        given = [name for name in _OVERLONG if getattr(config, name) not in (None, 1.0)]
        if given:
            raise ValueError(
                f"algorithm.{given[0]} acts with both algorithm.overlong_tokens (the longest length) and algorithm.overlong_buffer (the last part "
                f"of it) only, got {longest} and {buffer}; give both or leave it out"
            )
        return
    if buffer >= longest:
        raise ValueError(
            f"algorithm.overlong_buffer: expected less than algorithm.overlong_tokens ({longest}), got {buffer}: every length would be punished"
        )
    if config.advantage == "maxrl":
        raise ValueError(
            "algorithm.overlong_tokens makes rewards negative, and advantage maxrl needs rewards of 0 or more; leave it out or choose another"
        )
    if config.advantage == "none":
        raise ValueError(
            "algorithm.overlong_tokens has no effect with advantage none, which takes nothing from the rewards; leave it out"
        )


def check_reachable(config: AlgorithmConfig, most: int) -> None:
    """ValueError where units of a single call, of at most `most` tokens, are never long enough for the punishment."""
    free = (config.overlong_tokens or 0) - (config.overlong_buffer or 0)
    if config.overlong_tokens is not None and free >= most:
        raise ValueError(
            f"algorithm.overlong_tokens {config.overlong_tokens} with overlong_buffer {config.overlong_buffer} punishes calls of more than {free} tokens, "
            f"and with credit.unit call none has more than {most} (rollout.max_tokens, engine.max_model_len); leave it out or lower it"
        )


_OVERLONG = ("overlong_tokens", "overlong_buffer", "overlong_factor")
"""Switches of the soft overlong punishment, which act together (algorithms/overlong_shaping.py)."""


def located_reference(config: AlgorithmConfig, base: Path) -> AlgorithmConfig:
    """With the folder of `kl.reference` as it is found from anywhere. InputError where it is neither a model folder nor a checkpoint.
    base: folder of the configuration file."""
    folder = reference_folder(config.kl, base)
    if folder is None:
        return config
    kl = config.kl.model_copy(update={"reference": str(folder)})
    return config.model_copy(update={"kl": kl})


_ACTS_WITH: dict[str, tuple[str, tuple[str, ...]]] = {
    "unit": (
        "aggregation",
        ("seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"),
    ),
    "refill_batches": ("zero_signal", ("refill",)),
    "gae_over": ("advantage", ("gae",)),
    "norm_tokens": ("aggregation", ("seq-mean-token-sum-norm",)),
    "tis_cap": ("correction", ("tis", "seq-tis")),
    "icepop_low": ("correction", ("icepop", "seq-mask")),
    "icepop_high": ("correction", ("icepop", "seq-mask")),
    "geometric_band": ("correction", ("geometric-mask",)),
}
"""Switches that act only with certain values of another; a value of their own is refused elsewhere. Those that advantage and loss functions read are
not here: each function says which it does (agl_ray/algorithms/registry.py)."""
