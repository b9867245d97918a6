"""The section `runners`: pools of runners, how many there are in each, and how they keep agents apart from one another.

Called by `agl_ray.config.models`. Test alone: tests/unit/test_config_load.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from agl_ray.config.section import NonNegative, Positive, PositiveFloat, Section

_OF_RAY = (
    "CPU",
    "GPU",
    "memory",
    "object_store_memory",
)  # resources that have options of their own


FIRST = "runner"  # the name of the pool that the section itself is; part of its runners' names
PoolName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")]


class RunnerPoolConfig(Section):
    """One pool. `check` is called by the section that it stands in, which knows its name."""

    num_runners: Positive = 1
    """Runner actors in the pool, spread over the nodes."""
    min_runners: NonNegative | None = None
    """With `max_runners`, instead of `num_runners`: the pool grows while rollouts wait in the store's queue, and shrinks again. This many
    runners are always there; 0: none while there is no work."""
    max_runners: Positive | None = None
    """Most runners of a pool that grows."""
    idle_seconds: PositiveFloat = 60.0
    """A runner above `min_runners` that has run nothing for so long leaves; what it takes up at that moment it finishes first."""
    concurrency: Positive = 64
    """Rollouts that one runner works on at once."""
    isolation: Literal["inline", "thread", "process"] = "inline"
    """inline: a coroutine runs on the runner's own loop, a plain function in a thread. thread: every rollout in a thread with a loop of its own,
    so that a coroutine that blocks holds up no other. process: every rollout in a fresh process (Linux), which is ended at its deadline with
    all that it has started, whose crash is its own end only, and whose output is kept with the attempt. A thread cannot be ended: a plain
    function that overruns under inline or thread is left behind, counted as `left_threads` in its runner's heartbeat. Tasks that a coroutine
    has begun end with its rollout; under inline, what an installed package has begun is stopped at the deadline only, since rollouts may share
    it. What still runs is counted as `left_tasks`."""
    num_cpus: Annotated[float, Field(ge=0)] = 0.1
    """CPUs that Ray reserves for one runner."""
    resources: dict[str, PositiveFloat] = {}
    """Custom Ray resources that one runner needs (`{sandbox: 1}`); it is placed on a node that has them free."""
    runtime_env: dict[str, Any] = {}
    """Ray's runtime environment of every runner, as Ray knows it: `pip`, `uv`, `conda`, `working_dir`, `py_modules`, `env_vars`, `image_uri`, ... .
    `working_dir` and `py_modules` as URIs of archives (`https://.../agent.zip`, `s3://...`): folders Ray takes of a whole job only."""
    start_seconds: PositiveFloat = 300.0
    """Deadline for a runner to be placed, its environment to be made and its process to come up. The run ends where one of `min_runners` (or
    `num_runners`) does not make it; a runner above them is given up, and asked for again a minute later."""

    @property
    def elastic(self) -> bool:
        return self.max_runners is not None

    @property
    def fewest(self) -> int:
        """Runners that are there at any time."""
        return self.num_runners if self.min_runners is None else self.min_runners

    @property
    def most(self) -> int:
        return self.num_runners if self.max_runners is None else self.max_runners

    def check(self, at: str) -> None:
        """ValueError for what cannot be together; `at`: where the pool stands (`runners`, `runners.pools.spot`)."""
        if (self.min_runners is None) != (self.max_runners is None):
            raise ValueError(
                f"{at}: give min_runners and max_runners together, or num_runners alone"
            )
        if self.min_runners is not None and self.max_runners is not None:
            if self.num_runners != 1:
                raise ValueError(
                    f"{at}.num_runners ({self.num_runners}) is the size of a pool that does not grow; leave it out beside min_runners and max_runners"
                )
            if self.min_runners > self.max_runners:
                raise ValueError(
                    f"{at}.min_runners ({self.min_runners}) is larger than {at}.max_runners ({self.max_runners})"
                )
        elif self.idle_seconds != 60.0:
            raise ValueError(f"{at}.idle_seconds acts together with {at}.max_runners only")
        for name in self.resources:
            if name in _OF_RAY:
                raise ValueError(
                    f"{at}.resources: {name} is not a custom resource; expected names that the cluster's nodes were started with"
                    + (f", and {at}.num_cpus for CPUs" if name == "CPU" else "")
                )
        if self.runtime_env:
            _check_runtime_env(self.runtime_env, at)


class RunnersConfig(RunnerPoolConfig):
    lease_seconds: PositiveFloat = 30.0
    """A runner that Ray cannot see to be dead but that renews no lease for this long loses its attempts (`lost`)."""
    pools: dict[PoolName, RunnerPoolConfig] = {}
    """Further pools of the same agent beside the one that this section is, each with the keys above (`spot: {min_runners: 0, max_runners: 8,
    resources: {spot: 1}}`); what one leaves out has its default. All take from one queue. Pools grow in the order in which they stand here: one
    adds runners only once those before it have all that they may have, or find no place."""

    @property
    def by_name(self) -> dict[str, RunnerPoolConfig]:
        """Every pool, in the order in which they grow."""
        return {FIRST: self, **self.pools}

    @property
    def capacity(self) -> int:
        """Rollouts that are worked on at once, at the least."""
        pools = self.by_name.values()
        return sum(pool.fewest * pool.concurrency for pool in pools) or self.concurrency

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self.check("runners")
        for name, pool in self.pools.items():
            if name == FIRST:
                raise ValueError(
                    f"runners.pools: {FIRST!r} is the name of the pool that the section runners itself is; give this one another"
                )
            pool.check(place_of(name))
        return self


def place_of(pool: str) -> str:
    """Where the pool of this name stands in the configuration."""
    return "runners" if pool == FIRST else f"runners.pools.{pool}"


def _check_runtime_env(given: dict[str, Any], at: str) -> None:
    """ValueError, with Ray's words, for what Ray would refuse later."""
    from ray.runtime_env import RuntimeEnv

    known = {
        name.removeprefix("_") for name in RuntimeEnv.known_fields - RuntimeEnv.extensions_fields
    }
    unknown = sorted(set(given) - RuntimeEnv.known_fields - known)
    if unknown:
        raise ValueError(
            f"{at}.runtime_env: expected keys that Ray knows ({', '.join(sorted(known))}), got {unknown[0]!r}"
        )
    for name in ("working_dir", "py_modules"):
        value = given.get(name) or []
        for one in [value] if isinstance(value, str) else value:
            if "://" not in str(one):
                raise ValueError(
                    f"{at}.runtime_env: {name}: expected the URI of an archive (https://.../agent.zip, s3://..., gs://...), got {one!r}: Ray takes "
                    "folders of a whole job only (ray job submit --working-dir)"
                )
    try:
        RuntimeEnv(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{at}.runtime_env: {error}") from error
