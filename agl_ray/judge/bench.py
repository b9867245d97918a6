"""A bench of judges in one process: each question is asked once, at a pace, a few at a time, again where it failed, until its deadline.

What it is: `Bench(ask, ...)` around a function that asks one question (functions.py, endpoint.py). Cases with the same content that come at the same
time share one question; verdicts are remembered, failures are not.
Who calls it: the judge actor. Test alone: tests/unit/test_judge_bench.py.
"""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from agl_ray.judge.case import Case, Verdict
from agl_ray.ops.pace import Pace
from agl_ray.types import AglError
from agl_ray.waits import wait

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0  # seconds between tries

Ask = Callable[[Case], Awaitable[Verdict]]


class JudgeFailed(AglError):
    """There is no verdict: the judge failed, or refused. The attempt gets no reward."""


class AskAgain(Exception):
    """A question failed in a way that may pass. after: seconds to wait at least, where the other side said so."""

    def __init__(self, why: str, after: float = 0.0) -> None:
        super().__init__(why)
        self.after = after


class Bench:
    """One event loop. requests_per_minute: of this bench alone; the other numbers as in `JudgeConfig`."""

    def __init__(
        self,
        ask: Ask,
        *,
        retries: int,
        timeout_seconds: float,
        concurrency: int,
        cache_size: int,
        requests_per_minute: float | None = None,
        first_pause: float = FIRST_PAUSE,
    ) -> None:
        self._ask, self._retries, self._seconds = ask, retries, timeout_seconds
        self._pause, self._size = first_pause, cache_size
        self._pace = None if requests_per_minute is None else Pace(requests_per_minute)
        self._places = asyncio.Semaphore(concurrency)
        self._known: OrderedDict[str, Verdict] = OrderedDict()
        self._open: dict[str, asyncio.Task[Verdict]] = {}
        self.asked = self.remembered = self.failed = 0

    async def verdict(self, case: Case) -> Verdict:
        """The verdict on `case`; JudgeFailed says why there is none."""
        key = case.digest()
        if self._size and (known := self._known.get(key)) is not None:
            self._known.move_to_end(key)
            self.remembered += 1
            return _for(case, known)
        task = self._open.get(key) if self._size else None
        if task is None:
            task = asyncio.create_task(self._judge(key, case))
            if self._size:
                self._open[key] = task
                task.add_done_callback(lambda done: self._close(key, done))
        else:
            self.remembered += 1
        # Whoever shares the question may go away; the others still want its answer.
        return _for(case, await asyncio.shield(task))

    def _close(self, key: str, task: asyncio.Task[Verdict]) -> None:
        self._open.pop(key, None)
        if not task.cancelled():
            task.exception()  # seen, even where everybody who wanted the answer has gone

    async def _judge(self, key: str, case: Case) -> Verdict:
        tries: list[str] = []
        try:
            said = await wait(
                self._try(case, tries), on="the judge's verdict", seconds=self._seconds
            )
            verdict = _without_ids(case, said)
        except TimeoutError as error:
            self.failed += 1
            last = f"; last try: {tries[-1]}" if tries else ""
            raise JudgeFailed(
                f"the judge gave no verdict within judge.timeout_seconds ({self._seconds:g} s){last}"
            ) from error
        except JudgeFailed:
            self.failed += 1
            raise
        except Exception as error:
            self.failed += 1
            raise JudgeFailed(f"the judge: {type(error).__name__}: {error}") from error
        if self._size:
            self._known[key] = verdict
            if len(self._known) > self._size:
                self._known.popitem(last=False)
        return verdict

    async def _try(self, case: Case, tries: list[str]) -> Verdict:
        pause = self._pause
        while True:
            after = 0.0
            async with self._places:
                if self._pace is not None:
                    await self._pace.turn()
                self.asked += 1
                try:
                    return await self._ask(case)
                except AskAgain as error:
                    tries.append(str(error))
                    after = error.after
            if len(tries) > self._retries:
                raise JudgeFailed(f"the judge failed {len(tries)} times: {tries[-1]}")
            await asyncio.sleep(max(after, pause * random.uniform(0.5, 1.0)))
            pause = min(2 * pause, LONGEST_PAUSE)


def _without_ids(case: Case, verdict: Verdict) -> Verdict:
    """Its calls by number: the ids of another attempt with the same content are others."""
    numbers = {one.call_id: str(number) for number, one in enumerate(case.calls)}
    unknown = verdict.calls.keys() - numbers.keys()
    if unknown:
        raise JudgeFailed(
            f"the judge rewarded call {sorted(unknown)[0]!r}: expected call ids of the case, {sorted(numbers)[:3]}..."
        )
    return _with(verdict, {numbers[name]: value for name, value in verdict.calls.items()})


def _for(case: Case, verdict: Verdict) -> Verdict:
    return _with(
        verdict, {case.calls[int(name)].call_id: value for name, value in verdict.calls.items()}
    )


def _with(verdict: Verdict, calls: dict[str, float]) -> Verdict:
    return Verdict(
        reward=verdict.reward,
        dimensions=verdict.dimensions,
        calls=calls,
        tags=verdict.tags,
        comment=verdict.comment,
    )
