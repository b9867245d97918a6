"""Threads and pools belong to the rollout that used them, and to none where no rollout did."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

import agl_ray as agl
from agl_ray.tracing import SpanRecorder, carry, recording, threads
from agl_ray.tracing.recorder import recorder_here


@pytest.fixture(autouse=True)
def following() -> Iterator[None]:
    threads.follow_threads()
    threads.follow_threads()
    yield
    threading.Thread.start = threads._start  # type: ignore[method-assign]
    ThreadPoolExecutor.submit = threads._submit  # type: ignore[method-assign]


def here() -> str | None:
    recorder = recorder_here()
    return recorder and recorder.attempt_id


class Worker(threading.Thread):
    """With a `run` of its own, that does not call the base's."""

    found: str | None = "not run"

    def run(self) -> None:
        self.found = here()
        agl.emit_message("from the worker")


def test_a_thread_is_its_starters() -> None:
    recorder = SpanRecorder("ro-1", "at-1")
    found: list[str | None] = []
    with recording(recorder), agl.operation() as op:
        worker = Worker()
        timer = threading.Timer(0.0, lambda: found.append(here()))
        for thread in (worker, timer):
            thread.start()
        for thread in (worker, timer):
            thread.join()
    outside = threading.Thread(target=lambda: found.append(here()))
    outside.start()
    outside.join()
    assert (worker.found, found) == ("at-1", ["at-1", None])
    message, _ = recorder.close()
    assert message["parent_id"] == op.span().span_id


def test_a_pool_serves_many_rollouts() -> None:
    """Its one thread is started inside of the first rollout and belongs to nobody."""

    async def rollout(number: int, pool: ThreadPoolExecutor) -> list[str | None]:
        loop = asyncio.get_running_loop()
        with recording(SpanRecorder("ro", f"at-{number}")):
            await asyncio.sleep(0)
            return [
                await loop.run_in_executor(pool, here),
                await asyncio.wrap_future(pool.submit(here)),
                *pool.map(lambda _: here(), range(2)),
                await asyncio.to_thread(here),
            ]

    async def main() -> None:
        with ThreadPoolExecutor(1) as pool:
            found = await asyncio.gather(*(rollout(number, pool) for number in range(6)))
            assert found == [[f"at-{number}"] * 5 for number in range(6)]
            assert pool.submit(here).result() is None
            loop = asyncio.get_running_loop()
            assert await loop.run_in_executor(None, here) is None

    asyncio.run(main())


def test_what_fails_in_a_pool_fails_as_ever() -> None:
    def fails(text: str, *, more: str) -> None:
        raise KeyError(text + more)

    with ThreadPoolExecutor(1) as pool, recording(SpanRecorder("ro-1", "at-1")):
        failed = pool.submit(fails, "a", more="b")
        assert isinstance(failed.exception(), KeyError)
    with pytest.raises(RuntimeError, match="after shutdown"), recording(SpanRecorder("ro", "at")):
        pool.submit(here)


def test_carry_is_for_queues_of_ones_own() -> None:
    with recording(SpanRecorder("ro-1", "at-1")):
        work = carry(here)
    assert here() is None
    assert work() == "at-1"
    assert here() is None
