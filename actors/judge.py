"""Judge: gives verdicts on finished attempts, many at once; the pool that keeps judges, and how runners reach them.

One Ray actor of a pool. It holds nothing but its cache: when it dies, Ray starts it again and asks its open questions once more.

    loop      consumes     produces     waits for
    verdict   one case     a verdict    a turn, the user's function or the model, at most judge.timeout_seconds

Called by: the runner pool (`JudgePool`), runners (`JudgeClient`). Thin: the room is agl_ray/judge. Test alone:
tests/integration/test_runner_judge.py.
"""

from __future__ import annotations

from pathlib import Path

import ray
from ray.actor import ActorHandle

from agl_ray.config.judge import JudgeConfig
from agl_ray.judge import Bench, Case, JudgeFailed, Verdict
from agl_ray.judge.asking import asking
from agl_ray.types import AglError, new_id
from agl_ray.waits import wait

START = 60.0  # seconds for a judge to come up and load its function
GRACE = 30.0  # seconds past its own deadline that a judge gets to say so; it may be starting again
TRIES = 2  # of a question whose judge died, besides the first


class Judge:
    """One judge of `config`. A function is loaded from its import string, resolved against `base`."""

    def __init__(self, config: JudgeConfig, base: str) -> None:
        self.config, self.base = config, base
        self._bench: Bench | None = None

    async def open(self) -> None:
        """Load what judges. InputError where the function is none, ConfigError where its key is missing."""
        self._opened()

    async def verdict(self, case: Case) -> Verdict:
        """JudgeFailed says why there is none."""
        return await self._opened().verdict(case)

    async def statistics(self) -> dict[str, int]:
        """Since this process began: questions asked (retries included), verdicts remembered, verdicts that failed."""
        bench = self._opened()
        return {"asked": bench.asked, "remembered": bench.remembered, "failed": bench.failed}

    def _opened(self) -> Bench:
        """Not made with the actor: an error there would reach nobody in words."""
        if self._bench is None:
            config = self.config
            rate = config.requests_per_minute
            self._bench = Bench(
                asking(config, Path(self.base)),
                retries=config.retries,
                timeout_seconds=config.timeout_seconds,
                concurrency=config.concurrency,
                cache_size=config.cache_size,
                requests_per_minute=None if rate is None else rate / config.num_judges,
            )
        return self._bench


class JudgeClient:
    """The judges as a runner sees them; picklable. Cases with the same content go to the same judge, which remembers."""

    def __init__(self, judges: list[ActorHandle], timeout_seconds: float) -> None:
        self._judges, self._seconds = judges, timeout_seconds

    async def verdict(self, case: Case) -> Verdict:
        """JudgeFailed where there is none, whatever the cause."""
        judge = self._judges[int(case.digest()[:8], 16) % len(self._judges)]
        try:
            return await wait(
                judge.verdict.remote(case), on="a judge", seconds=self._seconds + GRACE
            )
        except ray.exceptions.RayTaskError as error:
            raise JudgeFailed(str(error.cause)) from error
        except (ray.exceptions.RayError, TimeoutError) as error:
            raise JudgeFailed(f"the judge's process: {type(error).__name__}: {error}") from error


class JudgePool:
    """`start` places the judges, `stop` ends them. They die with the process that started them."""

    def __init__(self, config: JudgeConfig, *, base: str, namespace: str) -> None:
        self._judges = [
            ray.remote(Judge).options(**_options(config, namespace)).remote(config, base)
            for _ in range(config.num_judges)
        ]
        self.client = JudgeClient(self._judges, config.timeout_seconds)

    async def start(self) -> None:
        """Wait until every judge has loaded what judges; its own error where it cannot."""
        for judge in self._judges:
            try:
                await wait(judge.open.remote(), on="a judge to start", seconds=START)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, AglError):
                    raise error.cause from error
                raise

    async def statistics(self) -> list[dict[str, int]]:
        """Of every judge, see `Judge.statistics`."""
        return [
            await wait(judge.statistics.remote(), on="a judge's statistics", seconds=START)
            for judge in self._judges
        ]

    def stop(self) -> None:
        for judge in self._judges:
            ray.kill(judge)


def _options(config: JudgeConfig, namespace: str) -> dict[str, object]:
    return {
        "name": new_id("judge"),
        "namespace": namespace,
        "num_cpus": config.num_cpus,
        "max_restarts": -1,
        "max_task_retries": TRIES,
        "max_concurrency": 10_000,  # questions wait for their turn inside
        "scheduling_strategy": "SPREAD",
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}},
    }
