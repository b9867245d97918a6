"""The section `learner.critic` of the configuration: the model that foretells returns, for `algorithm.advantage: gae` (PPO).

It acts with a critic's advantage only; RunConfig refuses it elsewhere. Read by agl_ray/learner/critic.py. Test it alone with
tests/unit/test_config_critic.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from agl_ray.config.section import Fraction, NonNegative, Positive, PositiveFloat, Section

if TYPE_CHECKING:
    from agl_ray.config.algorithm import AlgorithmConfig
    from agl_ray.config.credit import CreditConfig

GROUP_BASELINES = ("group", "rloo", "maxrl", "opo", "gigpo")
"""Our advantages that need others of the same group."""
WITHOUT_CRITIC = (*GROUP_BASELINES, "rae", "reward", "none")


class CriticConfig(Section):
    lr: PositiveFloat = 1e-3
    """Highest AdamW learning rate, after warm-up; it falls with the policy's (`learner.schedule`). Several times as high as that, since the values
    start at 0 everywhere."""
    warmup_steps: NonNegative = 0
    """Linear warm-up in optimiser updates of the critic."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW weight decay."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW betas."""
    max_grad_norm: PositiveFloat = 1.0
    """Global-norm clipping of the critic's gradient, apart from the policy's."""
    epochs: Positive = 1
    """Passes over the batch per step; each makes `learner.minibatches` updates of the critic."""
    value_clip: PositiveFloat | None = 0.5
    """Most that a value may gain by moving away from what it was at the start of the batch. Acts only with several updates of the critic per
    batch (`epochs`, `learner.minibatches`). None = off."""
    alone_steps: NonNegative = 0
    """Training steps at the beginning in which the critic learns alone (value pretraining, arXiv 2503.01491); the policy stays as it is."""


def check_baseline(
    algorithm: AlgorithmConfig, credit: CreditConfig, critic: CriticConfig, min_group: int
) -> None:
    """ValueError where a key of these three sections would do nothing beside the others, or a group is too small for its baseline."""
    name = algorithm.advantage
    if min_group < 2 and name in GROUP_BASELINES:
        raise ValueError(
            f"rollout.min_group: expected 2 or more, got {min_group}: algorithm.advantage {name} compares the rollouts of a group, and one "
            "alone has nothing to be compared with"
        )
    changed = [key for key, value in critic if value != getattr(CriticConfig(), key)]
    if changed and (name in WITHOUT_CRITIC or ":" in name):
        raise ValueError(
            f"learner.critic.{changed[0]} acts with algorithm.advantage gae only (algorithm.name: ppo), and advantage is {name!r}; leave it out"
        )
    if name != "gae":
        return
    if credit.group != "row":
        raise ValueError(
            f"credit.group {credit.group} says which units are compared, and algorithm.advantage gae compares none; leave it out"
        )
    if algorithm.gae_over == "rollout" and credit.unit == "rollout":
        raise ValueError(
            "algorithm.gae_over rollout joins the units of a rollout, and with credit.unit rollout there is one; leave it out"
        )
    if algorithm.gae_over == "rollout" and credit.outcome == "broadcast":
        raise ValueError(
            "algorithm.gae_over rollout adds up the rewards of a rollout's units: with credit.outcome broadcast the rollout's own reward would "
            "count once for every unit; say last or none"
        )
