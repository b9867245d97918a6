"""One file per algorithm; base.py says what one is made of."""

from __future__ import annotations

from agl_ray.algorithms.registry import advantage, policy_loss

__all__ = ["advantage", "policy_loss"]
