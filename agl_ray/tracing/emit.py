"""Emitters: what an agent may say about itself while it runs."""

from __future__ import annotations

import math
from typing import Any

from agl_ray.spans import KIND_REWARD
from agl_ray.tracing.recorder import current_recorder

REWARD_SPAN = "agentlightning.annotation"  # the name that agent-lightning 0.3 gives to it


def emit_reward(reward: float, *, attributes: dict[str, Any] | None = None) -> str:
    """Record a reward for the running rollout and return the span's id.

    The last one emitted is the rollout's reward when the agent returns None. ValueError for anything that is not a
    finite number (a NaN is a bug of the agent's, never a reward).
    """
    value = finite_reward(reward)
    return current_recorder().add(
        name=REWARD_SPAN,
        kind=KIND_REWARD,
        reward=value,
        reward_dimension="primary",
        attributes={"agentlightning.reward.0.value": value, **(attributes or {})},
    )


def finite_reward(value: Any) -> float:
    """`value` as a float; ValueError where it is no finite real number."""
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return float(value)
    if hasattr(value, "item") and getattr(value, "size", 2) == 1:  # a NumPy scalar
        return finite_reward(value.item())
    raise ValueError(f"reward: expected a finite number, got {value!r}")
