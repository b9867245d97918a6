"""Covariance of a token: how much it alone lowers the policy's entropy (arXiv 2505.22617, section 4).

    Cov(t) = (A_t - mean(A)) (log pi_t - mean(log pi))

An update changes the entropy by about minus the mean of it, and few tokens make most of that mean: likely ones with a high advantage (or unlikely
ones with a low one). clip_cov.py and kl_cov.py act on these. Means and ranks are taken over all counted tokens of the update, whatever
the micro-batches and ranks (the authors' code: over those of one micro-batch).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agl_ray.algorithms.base import Tokens

if TYPE_CHECKING:
    import torch


def covariances(tokens: Tokens) -> torch.Tensor:
    """float64 [K]."""
    away = tokens.advantages - tokens.advantages.mean()
    return away * (tokens.logprobs - tokens.logprobs.mean())


def number_chosen(tokens: Tokens, share: float) -> int:
    """That share of the tokens, at least one."""
    return max(1, int(share * len(tokens.logprobs)))
