"""The section `runners`: how many runners there are, and how they keep agents apart from one another.

Called by `agl_ray.config.models`. Test alone: tests/unit/test_config_load.py.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from agl_ray.config.section import Positive, PositiveFloat, Section


class RunnersConfig(Section):
    num_runners: Positive = 1
    """Runner actors in the pool, spread over the nodes."""
    concurrency: Positive = 64
    """Rollouts that one runner works on at once."""
    isolation: Literal["inline", "thread", "process"] = "inline"
    """inline: a coroutine runs on the runner's own loop, a plain function in a thread. thread: every rollout in a thread with a loop of its own,
    so that a coroutine that blocks holds up no other. process: every rollout in a fresh process (Linux), which is ended at its deadline with
    all that it has started, whose crash is its own end only, and whose output is kept with the attempt. A thread cannot be ended: a plain
    function that overruns under inline or thread is left behind, counted as `left_threads` in its runner's heartbeat."""
    lease_seconds: PositiveFloat = 30.0
    """A runner that Ray cannot see to be dead but that renews no lease for this long loses its attempts (`lost`)."""
    num_cpus: Annotated[float, Field(ge=0)] = 0.1
    """CPUs that Ray reserves for one runner."""
