"""Clip-Cov (arXiv 2505.22617): a few tokens of high covariance get no gradient, so that the policy keeps its entropy.

    gain_t = 0 for `cov_share` of the update's tokens, drawn at random from those with cov_low < Cov(t) < cov_high that the clip leaves alone,
             PPO's clipped gain (grpo.py) for the others

Cov: covariance.py, of the policy now, so each update costs one more forward pass. The bounds are the authors', for advantages of standard
deviation 1 (the preset's `normalize: group`); `cov_share` of all tokens, at least one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agl_ray.algorithms.base import Gain, LossInputs, Tokens
from agl_ray.algorithms.covariance import covariances, number_chosen
from agl_ray.algorithms.grpo import CLIPS, clip
from agl_ray.algorithms.registry import policy_loss

if TYPE_CHECKING:
    import torch

    from agl_ray.config.algorithm import AlgorithmConfig


def drawn(tokens: Tokens, config: AlgorithmConfig) -> torch.Tensor:
    """bool [K]: which tokens get no gradient."""
    import torch

    ratio = torch.exp(tokens.logprobs - tokens.old_logprobs)
    within = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    clipped = within * tokens.advantages < ratio * tokens.advantages
    covariance = covariances(tokens)
    eligible = (covariance > config.cov_low) & (covariance < config.cov_high) & ~clipped
    places = torch.nonzero(eligible)[:, 0]
    first = torch.argsort(tokens.draws[places])[: number_chosen(tokens, config.cov_share)]
    chosen = torch.zeros_like(eligible)
    chosen[places[first]] = True
    return chosen


@policy_loss("clip_cov", choose=drawn, reads=(*CLIPS, "cov_share", "cov_low", "cov_high"))
def clip_cov(inputs: LossInputs, config: AlgorithmConfig) -> Gain:
    """The gain [T]. Marks: cov_fraction (share of tokens without gradient by their covariance), and those of PPO's clip."""
    import torch

    chosen = inputs.chosen_tokens()
    gain, marks = clip(inputs, config)
    return Gain(torch.where(chosen, 0.0, gain), {**marks, "cov_fraction": chosen})
