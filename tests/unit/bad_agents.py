"""Agents that do what agents must not do; imported by name in the processes that run them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from typing import Any

import agl_ray as agl

SEEN: list[Any] = []


@agl.rollout
def misbehaves(task: dict[str, Any], ctx: agl.RolloutContext) -> float:
    """Does what the task says, synchronously."""
    return float(globals()[f"do_{task['do']}"](task, ctx))


@agl.rollout
async def misbehaves_async(task: dict[str, Any], ctx: agl.RolloutContext) -> float:
    """The same, from a coroutine."""
    if task["do"] == "hang":
        await asyncio.sleep(3600)
    if task["do"] == "ignore":
        while True:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                SEEN.append("ignored")
    if task["do"] == "exit_in_gather":
        await asyncio.gather(exits())
    if task["do"] == "exit_in_task":
        alone = asyncio.create_task(exits())  # nobody awaits it
        alone.add_done_callback(
            lambda one: one.cancelled() or one.exception()
        )  # no complaint later
        await asyncio.sleep(3600)
    return float(globals()[f"do_{task['do']}"](task, ctx))


async def exits() -> None:
    await asyncio.sleep(0)
    sys.exit(3)


def do_nothing(task: Any, ctx: Any) -> float:
    return 1.0


def do_run(task: Any, ctx: Any) -> float:
    """Runs a loop, as the synchronous faces of agent libraries do, and leaves another as this thread's."""

    async def ends() -> float:
        await asyncio.wait_for(asyncio.sleep(0), 5)
        assert asyncio.current_task() is not None
        return 0.5

    first = asyncio.run(ends())
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    second = loop.run_until_complete(ends())
    loop.close()
    return first + second


def do_raise(task: Any, ctx: Any) -> float:
    raise KeyError("no such tool")


def do_hang(task: Any, ctx: Any) -> float:
    agl.emit_reward(0.5)
    print("about to hang")
    (ctx.artifacts / "pid").write_text(str(os.getpid()))
    time.sleep(task.get("seconds", 3600))
    return 1.0


def do_meet(task: Any, ctx: Any) -> float:
    """Ends when `number` rollouts are here at once."""
    folder = ctx.artifacts.parent.parent / "here"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ctx.rollout_id).touch()
    while len(list(folder.iterdir())) < task["number"]:
        time.sleep(0.01)
    return 1.0


def do_exit(task: Any, ctx: Any) -> float:
    sys.exit(3)


def do_os_exit(task: Any, ctx: Any) -> float:
    print("good", "bye")
    os._exit(7)


def do_crash(task: Any, ctx: Any) -> float:
    os.kill(os.getpid(), 11)
    return 1.0


def do_fork(task: Any, ctx: Any) -> float:
    """A copy of the process comes out of the agent with another reward."""
    if os.fork() == 0:
        return 99.0
    time.sleep(0.2)
    return 1.0


def do_print(task: Any, ctx: Any) -> float:
    line = "x" * 1023 + "\n"
    for _ in range(task["bytes"] // 1024):
        sys.stdout.write(line)
    print("the last line")
    return 1.0


def do_threads(task: Any, ctx: Any) -> float:
    """Leaves a thread that never ends, and that the interpreter would wait for."""
    threading.Thread(target=time.sleep, args=(task.get("seconds", 3600),)).start()
    return 1.0


def do_daemons(task: Any, ctx: Any) -> float:
    """Leaves programs: a child, one in a session of its own, one without a parent. Then returns, or hangs."""
    program = ["sleep", "3600"]
    pids = [subprocess.Popen(program).pid, subprocess.Popen(program, start_new_session=True).pid]
    script = "sleep 3600 >/dev/null 2>&1 & echo $!"
    pids.append(
        int(subprocess.run(["setsid", "sh", "-c", script], capture_output=True, check=True).stdout)
    )
    (ctx.artifacts / "pids").write_text(" ".join(map(str, pids)))
    if task.get("hang"):
        time.sleep(3600)
    return 1.0


def do_remember(task: Any, ctx: Any) -> float:
    """How often this process has been here: 1 where it is fresh."""
    SEEN.append(1)
    return float(len(SEEN))


def do_span(task: Any, ctx: Any) -> float:
    """Makes a span of OpenTelemetry's, and leaves another open."""
    from opentelemetry import trace

    tracer = trace.get_tracer("bad_agents")
    with tracer.start_as_current_span("tool"):
        agl.emit_reward(0.5)
    tracer.start_span("open")
    return 1.0


def do_stubborn(task: Any, ctx: Any) -> float:
    """Heeds no SIGTERM."""
    import signal

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(3600)
    return 1.0
