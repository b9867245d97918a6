"""The section `algorithm.kl`: how far the policy may move from a reference model. Off unless `coefficient` is given.

The formulas are in agl_ray/algorithms/kl.py. `reference_folder` is called by the trainer, the learner and `agl-ray check`. Test alone:
tests/unit/test_config_kl.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from agl_ray.config.model_folder import check_model_folder
from agl_ray.config.paths import find, looked_in
from agl_ray.config.section import Section
from agl_ray.types.errors import InputError

Estimator = Literal["k1", "k2", "k3"]
BASE = "base"
POSITION = "position.json"
"""The file by which a folder is known as a checkpoint of ours (learner/checkpoint.py)."""


class KLConfig(Section):
    coefficient: Annotated[float, Field(ge=0)] | None = None
    """Weight of the KL divergence from the reference (0.001 to 0.05 are usual), which costs a forward pass and a second model in memory; with
    learner.lora the base model is the policy without its adapters and needs no second one.
    0: it is measured only (metric `kl_reference`). None: no reference is loaded."""
    where: Literal["loss", "reward"] = "loss"
    """`loss`: a term beside the policy loss, with the same token scale. `reward`: what a unit's trained tokens add up to is taken off its reward
    before the advantages, so that a token answers for the divergence of its whole unit (with a critic off the token's own reward, so for its own and the
    later ones); costs one more forward pass."""
    estimator: Estimator | None = None
    """Of a token, from l = log pi - log reference: k1 = l, k2 = l^2 / 2, k3 = exp(-l) + l - 1. None: the one with the right gradient, k2 in the
    loss, k1 in the reward."""
    weighted: bool = True
    """Loss only: weigh each token by pi / mu (its `correction` weight times pi / pi_old), which makes the gradient that of the
    divergence for all three. False with k3: GRPO's term, whose gradient is biased."""
    reference: str = BASE
    """`base`: the model that the run starts from. Else a Hugging Face model folder of the same vocabulary, or a checkpoint of a run of this model
    (`runs/NAME/checkpoints/step-000040`; of a run with learner.lora give its export)."""

    @property
    def on(self) -> bool:
        """Whether a reference is loaded."""
        return self.coefficient is not None

    @property
    def in_loss(self) -> bool:
        return bool(self.coefficient) and self.where == "loss"

    @property
    def in_reward(self) -> bool:
        return bool(self.coefficient) and self.where == "reward"

    @property
    def estimate(self) -> Estimator:
        """The estimator that is used."""
        return self.estimator or ("k2" if self.where == "loss" else "k1")

    @model_validator(mode="after")
    def _acts(self) -> KLConfig:
        fields = type(self).model_fields
        changed = [name for name in fields if getattr(self, name) != fields[name].default]
        if self.coefficient is None and changed:
            raise ValueError(f"algorithm.kl.{changed[0]} needs algorithm.kl.coefficient")
        shaping = [name for name in changed if name not in ("coefficient", "reference")]
        if self.coefficient == 0 and shaping:
            raise ValueError(
                f"algorithm.kl.{shaping[0]} has no effect with algorithm.kl.coefficient 0, which only measures; leave it out"
            )
        if self.where == "reward" and not self.weighted:
            raise ValueError("algorithm.kl.weighted acts with where: loss only; leave it out")
        if self.estimate == "k1" and not self.weighted:
            raise ValueError(
                "algorithm.kl: the gradient of an unweighted k1 in the loss is 0 on average, it would add nothing but noise; "
                "choose k2, or leave weighted out"
            )
        return self


def reference_folder(config: KLConfig, base: Path) -> Path | None:
    """The folder of the reference, found from the current directory or from `base`; None for the base model.

    InputError where it is neither a model folder nor a checkpoint.
    """
    if config.reference == BASE:
        return None
    folder = find(config.reference, base)
    if folder is None:
        raise InputError(
            f"algorithm.kl.reference: there is no folder {config.reference}; {looked_in(config.reference, base)}"
        )
    if not (folder / POSITION).is_file():
        check_model_folder(folder, "algorithm.kl.reference")
    return folder
