"""The sections `rollout` and `validation` of the configuration: how training and held-out rows are sampled.

Read by actors/rollout_groups.py and actors/session.py. Test it alone with tests/unit/test_config_load.py.
"""

from __future__ import annotations

from agl_ray.config.section import NonNegative, Positive, PositiveFloat, Section


class RolloutSection(Section):
    groups_per_step: Positive = 16
    """Rows (groups) per training step."""
    group_size: Positive = 8
    """Rollouts of the same row, from whose rewards `algorithm.advantage` makes the baseline. 1 only where it needs no group (gae, reward, rae)."""
    min_group: Positive = 2
    """A group with fewer `ok` attempts is dropped and replaced by another row; counted."""
    timeout_seconds: PositiveFloat = 60.0
    """Deadline of one attempt; past it the attempt ends `timeout`."""
    max_attempts: Positive = 2
    """Attempts per rollout when one ends `engine_error`, `env_error`, `timeout` or `lost`. An agent error is not retried."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature of training rollouts where the agent does not ask for one."""
    seeded: bool = True
    """Seed the sampling of every call by (run seed, row, member, number of the call), so that a run can be repeated; costs the
    engine a little per call. False: the engine's own random stream."""
    max_tokens: Positive | None = None
    """Most new tokens per model call where the agent does not ask for fewer. None = as many as `engine.max_model_len` has room for."""


class ValidationConfig(Section):
    rows: Positive = 256
    """Rows of `data.val` used (the first ones)."""
    every: NonNegative = 0
    """Validate each `every` steps as well as before and after; 0 = only before and after."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature of validation; its own, never the training one by accident."""
