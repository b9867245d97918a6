"""Agents: what a user writes, and how one attempt of it is run."""

from agl_ray.agents.agent import (
    EnvironmentFailure,
    FunctionAgent,
    LitAgent,
    RolloutContext,
    as_agent,
    rollout,
)
from agl_ray.agents.execute import Outcome, run_agent

__all__ = [
    "EnvironmentFailure",
    "FunctionAgent",
    "LitAgent",
    "Outcome",
    "RolloutContext",
    "as_agent",
    "rollout",
    "run_agent",
]
