"""An agent made ready in the process that will run it: imported between the tracing that must come before and after.

Called by `isolation` and `fork_child`. Test alone: tests/unit/test_agents_isolation.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from agl_ray.agents.agent import LitAgent, as_agent
from agl_ray.config.imports import load_object
from agl_ray.tracing import follow, instrument


def load_agent(agent: LitAgent | str, base: str, instruments: Sequence[str] | str) -> LitAgent:
    """`agent`, or what its import string names, resolved against `base`. instruments: as `tracing.instrument`.

    InputError where it cannot be imported or is no agent, ConfigError where an instrumentor is not there.
    """
    instrument(instruments)
    found = as_agent(load_object(agent, Path(base)) if isinstance(agent, str) else agent)
    follow()
    return found
