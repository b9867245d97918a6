"""Agents: what a user writes, and how one attempt of it is run."""

from agl_ray.agents.agent import (
    EnvironmentFailure,
    FunctionAgent,
    LitAgent,
    RolloutContext,
    as_agent,
    llm_rollout,
    prompt_rollout,
    rollout,
)
from agl_ray.agents.command import CommandAgent, agent_of
from agl_ray.agents.execute import NO_HOST, Host, Place, run_agent
from agl_ray.agents.hooks import Hook, check_hooks
from agl_ray.agents.outcome import Outcome, settled

__all__ = [
    "NO_HOST",
    "CommandAgent",
    "EnvironmentFailure",
    "FunctionAgent",
    "Hook",
    "Host",
    "LitAgent",
    "Outcome",
    "Place",
    "RolloutContext",
    "agent_of",
    "as_agent",
    "check_hooks",
    "llm_rollout",
    "prompt_rollout",
    "rollout",
    "run_agent",
    "settled",
]
