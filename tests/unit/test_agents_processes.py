"""Every rollout in a fresh process: what agents do there is the end of that process only, and nothing is left of it."""

from __future__ import annotations

import asyncio
import os
import pickle
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import descendants, is_alive

from agl_ray.agents import Host, Outcome, settled
from agl_ray.agents.processes import OUTPUT_SPAN, AgentProcesses
from agl_ray.agents.wire import Source
from agl_ray.tracing import SpanRecorder
from agl_ray.types import Attempt, AttemptedRollout, EndReason, InputError, Rollout, RunError

HERE = Path(__file__).parent
Run = Callable[..., Awaitable[tuple[Outcome, SpanRecorder]]]


def attempt_at(task: Any, name: str = "ro-1") -> AttemptedRollout:
    return AttemptedRollout(
        rollout=Rollout(rollout_id=name, input=task, start_time=0.0, mode="train"),
        attempt=Attempt(rollout_id=name, attempt_id="at-1", sequence_id=1, start_time=0.0),
    )


async def until(condition: Callable[[], Any]) -> None:
    """Wait for what other processes do, at most 60 s."""

    def look() -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    await asyncio.to_thread(look)


def named(agent: str, base: Path) -> Source:
    return Source(pickled=pickle.dumps((None, ())), name=agent, base=str(base))


def with_processes(
    folder: Path, scenario: Callable[[Run], Awaitable[None]], agent: str = "misbehaves"
) -> None:
    """`scenario(run)` with a fork server of bad_agents; afterwards no process may be left."""

    async def main() -> None:
        source = named(f"bad_agents.py:{agent}", HERE)
        processes = await AgentProcesses.start(source)
        host = Host(artifacts_folder=str(folder))

        async def run(
            task: Any, timeout: float = 60.0, name: str = "ro-1"
        ) -> tuple[Outcome, SpanRecorder]:
            recorder = SpanRecorder(name, "at-1")
            outcome = await processes.run(attempt_at(task, name), {}, recorder, timeout, host)
            return settled(outcome), recorder

        try:
            await scenario(run)
        finally:
            await processes.close()

    asyncio.run(main())
    assert list(descendants(os.getpid(), "agl_ray.agents.fork_server")) == []


def test_each_rollout_has_a_fresh_process_and_the_pool_goes_on(tmp_path: Path) -> None:
    expected = {
        "remember": (EndReason.OK, ""),
        "raise": (EndReason.AGENT_ERROR, "no such tool"),
        "exit": (EndReason.AGENT_ERROR, "sys.exit(3)"),
        "os_exit": (
            EndReason.AGENT_ERROR,
            "exited with code 7 before the agent returned; it last printed: good bye",
        ),
        "crash": (EndReason.AGENT_ERROR, "SIGSEGV"),
        "fork": (EndReason.OK, ""),
        "threads": (EndReason.OK, ""),
    }

    async def scenario(run: Run) -> None:
        for _ in range(2):
            for kind, (reason, text) in expected.items():
                outcome, _ = await run({"do": kind})
                assert (outcome.reason, outcome.reward) == (
                    reason,
                    1.0 if reason is EndReason.OK else None,
                )
                assert text in (outcome.error or "")

    with_processes(tmp_path, scenario)


def test_a_deadline_ends_a_plain_function_and_keeps_what_it_recorded_and_printed(
    tmp_path: Path,
) -> None:
    async def scenario(run: Run) -> None:
        file = tmp_path / "ro-1" / "at-1" / "pid"
        for seconds in (0.3, 6.0, 60.0):  # a slow machine needs longer to come so far
            outcome, recorder = await run({"do": "hang"}, timeout=seconds)
            assert outcome.reason is EndReason.TIMEOUT
            if file.exists():
                break
        reward, output = recorder.take()
        assert reward["reward"] == 0.5
        assert output["name"] == OUTPUT_SPAN
        assert output["attributes"] == {"bytes": 14, "tail": "about to hang\n"}
        assert not is_alive(int(file.read_text()))
        assert (await run({"do": "nothing"}))[0].reward == 1.0

    with_processes(tmp_path, scenario)


def test_a_process_that_ignores_sigterm_is_ended_all_the_same(tmp_path: Path) -> None:
    async def scenario(run: Run) -> None:
        outcome, _ = await run({"do": "stubborn"}, timeout=0.2)
        assert outcome.reason is EndReason.TIMEOUT

    with_processes(tmp_path, scenario)


@pytest.mark.parametrize("hang", [False, True])
def test_what_a_rollout_has_started_ends_with_it_wherever_it_hides(
    tmp_path: Path, hang: bool
) -> None:
    async def scenario(run: Run) -> None:
        other = asyncio.ensure_future(run({"do": "hang", "seconds": 3}, name="ro-2"))
        file = tmp_path / "ro-1" / "at-1" / "pids"
        for seconds in (1.0, 8.0, 60.0) if hang else (60.0,):  # as above
            outcome, _ = await run({"do": "daemons", "hang": hang}, timeout=seconds)
            assert outcome.reason is (EndReason.TIMEOUT if hang else EndReason.OK)
            if file.exists():
                break
        pids = [int(pid) for pid in file.read_text().split()]
        assert len(pids) == 3
        await until(lambda: not any(is_alive(pid) for pid in pids))
        assert (await other)[0].reward == 1.0

    with_processes(tmp_path, scenario)


@pytest.mark.slow
def test_a_gigabyte_of_output_is_bounded(tmp_path: Path) -> None:
    async def scenario(run: Run) -> None:
        before = psutil.Process().memory_info().rss
        outcome, recorder = await run({"do": "print", "bytes": 1 << 30}, timeout=60)
        assert outcome.reward == 1.0
        (output,) = recorder.take()
        assert output["attributes"]["bytes"] > 1 << 30
        assert output["attributes"]["tail"].endswith("x\nthe last line\n")
        assert len(output["attributes"]["tail"]) <= 64 * 1024
        assert psutil.Process().memory_info().rss - before < 64 << 20

    with_processes(tmp_path, scenario)


def test_many_at_once_do_not_wait_for_each_other(tmp_path: Path) -> None:
    async def scenario(run: Run) -> None:
        tasks = [run({"do": "meet", "number": 16}, name=f"ro-{i}", timeout=60.0) for i in range(16)]
        outcomes = await asyncio.gather(*tasks)
        assert [outcome.reward for outcome, _ in outcomes] == [1.0] * 16

    with_processes(tmp_path, scenario)


def test_a_cancelled_rollout_is_ended(tmp_path: Path) -> None:
    async def scenario(run: Run) -> None:
        task = asyncio.ensure_future(run({"do": "hang"}))
        file = tmp_path / "ro-1" / "at-1" / "pid"
        await until(lambda: file.exists() and file.read_text())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not is_alive(int(file.read_text()))

    with_processes(tmp_path, scenario)


def test_a_process_that_cannot_be_started_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuses(*given: Any, **more: Any) -> None:
        raise OSError("refused")

    async def scenario(run: Run) -> None:
        assert (await run({"do": "nothing"}))[0].reward == 1.0
        await asyncio.sleep(0.05)  # what that one has closed is the loop's to close
        before = psutil.Process().num_fds()
        places = ((AgentProcesses, "_tell"), (asyncio, "open_unix_connection"))
        for owner, name in places:
            with monkeypatch.context() as patched:
                patched.setattr(owner, name, refuses)
                with pytest.raises(OSError, match="refused"):
                    await run({"do": "nothing"}, timeout=0.2)
            await asyncio.sleep(0.05)
            assert psutil.Process().num_fds() == before

    with_processes(tmp_path, scenario)


@pytest.mark.parametrize(
    ("text", "error"),
    [("raise ValueError('no key')", "no key"), ("import os; os._exit(1)", "died")],
)
def test_an_agent_that_cannot_be_imported_is_an_input_error(
    tmp_path: Path, text: str, error: str
) -> None:
    (tmp_path / "broken.py").write_text(text)
    source = named("broken.py:agent", tmp_path)
    with pytest.raises(InputError, match=error):
        asyncio.run(AgentProcesses.start(source))


def test_an_import_that_starts_threads_is_made_in_each_process(tmp_path: Path) -> None:
    """Forking a process with threads may lock it for ever."""
    (tmp_path / "threaded.py").write_text(
        "import os, threading, time\nIMPORTED_IN = os.getpid()\n"
        "threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()\n"
        "def agent(task):\n    return float(os.getpid() == IMPORTED_IN)\n"
    )

    async def main() -> None:
        source = named("threaded.py:agent", tmp_path)
        processes = await AgentProcesses.start(source)
        try:
            recorder = SpanRecorder("ro-1", "at-1")
            outcome = await processes.run(attempt_at(1), {}, recorder, 20.0)
            assert outcome.reward == 1.0
        finally:
            await processes.close()

    asyncio.run(main())


async def daemons_of(
    processes: AgentProcesses, folder: Path
) -> tuple[asyncio.Future[Outcome], list[int]]:
    """A rollout that hangs, and the programs that it has started."""
    host = Host(artifacts_folder=str(folder))
    run = asyncio.ensure_future(
        processes.run(
            attempt_at({"do": "daemons", "hang": True}),
            {},
            SpanRecorder("ro-1", "at-1"),
            60.0,
            host,
        )
    )
    file = folder / "ro-1" / "at-1" / "pids"
    await until(lambda: file.exists() and file.read_text())
    return run, [int(pid) for pid in file.read_text().split()]


def test_everything_ends_with_the_runner(tmp_path: Path) -> None:
    """As when the runner is killed: its end of the socket closes."""

    async def main() -> None:
        processes = await AgentProcesses.start(named("bad_agents.py:misbehaves", HERE))
        run, pids = await daemons_of(processes, tmp_path)
        await processes.close()
        assert not any(is_alive(pid) for pid in pids)
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)

    asyncio.run(main())


def test_a_killed_fork_server_is_an_error_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        processes = await AgentProcesses.start(named("bad_agents.py:misbehaves", HERE))
        run, pids = await daemons_of(processes, tmp_path)
        os.kill(processes._server.pid, 9)
        with pytest.raises(RunError, match="fork server"):
            async with asyncio.timeout(5):
                await run
        with pytest.raises(RunError):
            await processes.failure
        await processes.close()
        for pid in pids:  # nobody was left to end them
            os.kill(pid, 9)

    asyncio.run(main())
