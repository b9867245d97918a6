"""Whether a runner is still there: its process may live while its event loop stands still for ever, of which Ray tells nobody.

Called by the runner pool, for each of its runners. The store ends the attempts of such a runner when their leases run out; here it is told
from one that is merely slow. Test alone: tests/integration/test_runner_pool.py.
"""

from __future__ import annotations

import asyncio
import contextlib

from ray.actor import ActorHandle

from agl_ray.types import WaitTimeout
from agl_ray.waits import wait

LEASES = 4.0  # leases that a runner may be silent
LEAST = 30.0  # seconds that it may be silent in any case


async def until_deaf(handle: ActorHandle, worker_id: str, lease_seconds: float) -> str:
    """Returns once the runner's event loop has answered nothing for LEASES leases, and says so in a sentence for people. Ray's own
    RayActorError where its process died."""
    patience = max(LEASES * lease_seconds, LEAST)
    while True:
        await asyncio.sleep(lease_seconds)
        answer = asyncio.wrap_future(handle.ping.remote().future())
        # The second wait is for a time in which this process, too, stood still: the first is over at once when it goes on.
        for seconds in (patience, lease_seconds):
            with contextlib.suppress(WaitTimeout):
                on = f"{worker_id} to show that its event loop runs"
                await wait(asyncio.shield(answer), on=on, seconds=seconds)
                break
        else:
            return (
                f"It was killed: its event loop had stood still for {patience + lease_seconds:g} s, and what it had leased was lost by then. An agent "
                "whose coroutine blocks does that (time.sleep, a synchronous client); runners.isolation: thread or process keeps such agents apart"
            )
