"""The start of a runner: until Ray has placed it, has made its environment and its constructor is through.

Called by the runner pool. Says why a runner does not start: what its environment's makers said, or what the cluster has where it has no
place. Test alone: tests/integration/test_runner_elastic.py.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import ray
from ray.actor import ActorHandle

from agl_ray.config.runners import RunnerPoolConfig
from agl_ray.types import RunError, WaitTimeout
from agl_ray.waits import wait

PATIENCE = 15.0  # seconds after which the person is told that a runner is not there yet
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class NotStarted(RunError):
    """A runner whose environment cannot be made, or that did not start by its deadline."""


async def started(
    handle: ActorHandle,
    worker_id: str,
    runners: RunnerPoolConfig,
    at: str,
    remark: Callable[[str], None],
) -> None:
    """Return when the runner answers. NotStarted where its environment cannot be made, or past `start_seconds` of its pool, which
    stands `at` this place of the configuration; Ray's own RayActorError where it died. remark: told, after a while, what it waits for."""
    answer = asyncio.wrap_future(handle.ping.remote().future())
    try:
        patience = min(PATIENCE, runners.start_seconds)
        done, _ = await asyncio.wait({answer}, timeout=patience)
        left = runners.start_seconds - patience
        if not done and left > 0:
            remark(f"{worker_id} has not started after {patience:g} s: {_why(runners, at)}")
        await wait(answer, on=f"{worker_id} to start", seconds=max(left, 0.0))
    except ray.exceptions.RuntimeEnvSetupError as error:
        raise NotStarted(
            f"runner pool: the environment of {at}.runtime_env cannot be made (for {worker_id}): {whole(error)}"
        ) from error
    except WaitTimeout as error:
        raise NotStarted(
            f"runner pool: {worker_id} did not start within {at}.start_seconds ({runners.start_seconds:g} s): {_why(runners, at)}"
        ) from error


def whole(error: BaseException) -> str:
    """All that Ray says, without the colours that it writes for terminals."""
    return _COLOURS.sub("", str(error)).strip() or type(error).__name__


def first_line(error: BaseException) -> str:
    return whole(error).splitlines()[0]


def _why(runners: RunnerPoolConfig, at: str) -> str:
    """What a runner needs and what the nodes have."""
    needs = {"CPU": runners.num_cpus, **runners.resources}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    words = f"a runner needs {_amounts(needs)}; "
    if not any(all(node.get(name, 0.0) >= much for name, much in needs.items()) for node in nodes):
        return (
            f"{words}no node of the cluster has that, together they have {_amounts(ray.cluster_resources())}. Make {at}.resources or "
            f"{at}.num_cpus smaller, or start nodes that have it"
        )
    free = ray.available_resources()
    if all(free.get(name, 0.0) >= much for name, much in needs.items()):
        what = (
            f"its environment ({at}.runtime_env) is being made, or its"
            if runners.runtime_env
            else "its"
        )
        return f"{words}the cluster has that free: {what} process is coming up, slowly"
    return f"{words}others hold its place; free in the cluster: {_amounts(free, needs)}"


def _amounts(resources: dict[str, Any], only: dict[str, Any] | None = None) -> str:
    """`2 CPU, 1 sandbox`: without the names that Ray gives to nodes and to memory."""
    shown = dict.fromkeys(only or (), 0.0) | {
        name: much
        for name, much in sorted(resources.items())
        if (only is None and ":" not in name and "memory" not in name) or name in (only or ())
    }
    return ", ".join(f"{much:g} {name}" for name, much in shown.items()) or "nothing"
