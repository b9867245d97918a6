"""How a LightningStore client reaches its store: through a Ray actor handle, or straight into a core of this process.

What it is: `call(command, *arguments, seconds=...)` runs one coroutine of `StoreCore` by name and gives its result or raises the
store's own error. `StoreAway` says that no answer came because the actor is restarting: the client asks again.
Who calls it: `agl_ray.store.client`. Test alone: tests/integration/test_store_actor.py.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import msgspec

from agl_ray import waits
from agl_ray.store.away import StoreAway as StoreAway
from agl_ray.store.core import StoreCore
from agl_ray.store.doors.messages import send_message
from agl_ray.store.lane import Command, answer_each
from agl_ray.store.link import Address, Link, LinkLost, linked
from agl_ray.types import AglError, StoreError, WaitTimeout

log = logging.getLogger("agl_ray.store")
T = TypeVar("T")

END_SECONDS = 30.0  # for Ray to note that a killed actor has ended
AGAIN_SECONDS = 30.0  # after a connection could not be made: until the next try


class Transport(Protocol):
    async def call(self, command: str, *arguments: Any, seconds: float) -> Any: ...

    async def close(self) -> None:
        """End the store's process, after its `shutdown`."""


@runtime_checkable
class GatheringTransport(Transport, Protocol):
    """One that carries several commands in one message."""

    def gathers(self) -> bool:
        """Whether that pays here and now; where not, every command is sent with `call`."""

    async def call_many(self, commands: Sequence[Command], *, seconds: float) -> list[Any]:
        """Per command its result or its error."""


class LocalTransport:
    """Into a core of this process, from any of its event loops."""

    def gathers(self) -> bool:
        """Across threads a message has its price, on the core's own loop it has none."""
        return asyncio.get_running_loop() is not self.core.loop

    def __init__(self, core: StoreCore) -> None:
        self.core = core

    def __reduce__(self) -> Any:
        raise TypeError(
            "a LightningStore.local lives in one process and cannot be pickled; use the store actor"
        )

    async def call(self, command: str, *arguments: Any, seconds: float) -> Any:
        on = f"the local store's answer to {command}"
        return await self._do(self._run(command, *arguments), on, seconds)

    async def call_many(self, commands: Sequence[Command], *, seconds: float) -> list[Any]:
        on = f"the local store's answers to {len(commands)} commands"
        return await self._do(answer_each(self._run, commands), on, seconds)

    def _run(self, command: str, *arguments: Any) -> Coroutine[Any, Any, Any]:
        work: Coroutine[Any, Any, Any] = getattr(self.core, command)(*arguments)
        return work

    async def _do(self, work: Coroutine[Any, Any, T], on: str, seconds: float) -> T:
        if asyncio.get_running_loop() is self.core.loop:
            return await waits.wait(work, on=on, seconds=seconds)
        future = asyncio.run_coroutine_threadsafe(work, self.core.loop)
        return await waits.wait(asyncio.wrap_future(future), on=on, seconds=seconds)

    async def close(self) -> None:
        """The core was closed by `shutdown`; there is no process to end."""


class ActorTransport:
    """To the named actor `Store` (actors/store.py). Picklable.

    What may wait in the store, or whose answer is large, is a call of the actor; the small commands of the lane travel over a connection
    to its process (`agl_ray.store.link`), or inside such calls where none can be made.
    """

    def __init__(self, handle: Any, name: str, namespace: str | None) -> None:
        self.handle, self.name, self.namespace = handle, name, namespace
        self._ways: dict[asyncio.AbstractEventLoop, _Way] = {}

    def __reduce__(self) -> Any:
        return (ActorTransport, (self.handle, self.name, self.namespace))

    def gathers(self) -> bool:
        return True

    async def call(self, command: str, *arguments: Any, seconds: float) -> Any:
        """Raises the store's own error, StoreAway while it restarts, StoreError once it is gone for good."""
        return await self._answer(self.handle.call.remote(command, *arguments), command, seconds)

    async def call_many(self, commands: Sequence[Command], *, seconds: float) -> list[Any]:
        more = f" and {len(commands) - 1} more" if len(commands) > 1 else ""
        words = commands[0][0] + more

        async def carry(body: bytes) -> bytes:
            return await self._carry(body, words, seconds)

        try:
            return await send_message(carry, commands, seconds)
        except msgspec.MsgspecError as error:
            raise StoreError(
                f"store {self.name!r}: its answer to {words} is not understood ({error}); are both sides of one version?"
            ) from error

    async def _carry(self, body: bytes, words: str, seconds: float) -> bytes:
        """A message's answer, over this loop's connection where there is one."""
        link = await self._linked(seconds)
        if link is None:
            answer: bytes = await self._answer(self.handle.message.remote(body), words, seconds)
            return answer
        try:
            on = f"store {self.name!r} to answer {words}"
            return await waits.wait(link.ask(body), on=on, seconds=seconds)
        except LinkLost as error:
            await self._still_there(error)
            raise StoreAway(str(error)) from error

    async def _linked(self, seconds: float) -> Link | None:
        loop = asyncio.get_running_loop()
        way = self._ways.get(loop)
        if way is None or not way.usable():
            for ended in [one for one in list(self._ways) if one.is_closed()]:
                self._ways.pop(ended, None)
            way = self._ways[loop] = _Way(self._address(seconds))
        return await way.link()

    async def _address(self, seconds: float) -> Address | None:
        address: Address | None
        ref = self.handle.link.remote()
        address = await self._answer(ref, "the question where it listens", seconds)
        return address

    async def _answer(self, ref: Any, command: str, seconds: float) -> Any:
        import ray

        on = f"store {self.name!r} to answer {command}"
        try:
            return await waits.wait(ref, on=on, seconds=seconds)
        except asyncio.CancelledError:
            ray.cancel(ref)  # a taker that has gone must not be given work
            raise
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, Exception):
                raise error.cause from None
            raise
        except ray.exceptions.RayActorError as error:
            await self._still_there(error)
            raise StoreAway(str(error)) from error

    async def _still_there(self, error: Exception) -> None:
        """StoreError where the actor will not come back."""
        if not await self._is_named():
            raise StoreError(f"store {self.name!r} has ended for good: {error}") from error

    async def _is_named(self) -> bool:
        """Whether the actor lives or will live again: Ray frees the name of one that ended for good."""
        import ray

        try:
            await asyncio.to_thread(ray.get_actor, self.name, namespace=self.namespace)
        except ValueError:
            return False
        return True

    async def close(self) -> None:
        """Returns when Ray has noted the end, so that the name can be used again."""
        import ray

        ray.kill(self.handle, no_restart=True)
        on = f"Ray to note the end of store {self.name!r}"
        await waits.wait(self._ended(), on=on, seconds=END_SECONDS)

    async def _ended(self) -> None:
        while await self._is_named():  # noqa: ASYNC110 - Ray offers no event for it
            await asyncio.sleep(0.02)


class _Way:
    """One event loop's connection to the store's process."""

    def __init__(self, address: Coroutine[Any, Any, Address | None]) -> None:
        self._life: AsyncGenerator[Link, None] | None = None
        self._made = asyncio.ensure_future(self._make(address))
        self._again_at = float("inf")  # where there is no connection: when to try again

    async def _make(self, asked: Coroutine[Any, Any, Address | None]) -> Link | None:
        address = await asked
        if address is not None:
            self._life = linked(address)
            try:
                return await anext(self._life)
            except (OSError, WaitTimeout) as error:
                log.warning(
                    "store: commands travel in calls of its actor, which is slower: %s", error
                )
        self._again_at = time.monotonic() + AGAIN_SECONDS
        return None

    def usable(self) -> bool:
        """Whether it is worth asking: it is being made, or holds, or there is none for now."""
        if not self._made.done():
            return True
        if self._made.cancelled() or self._made.exception() is not None:
            return False
        link = self._made.result()
        return time.monotonic() < self._again_at if link is None else not link.lost

    async def link(self) -> Link | None:
        """None where none can be made. Raises what asking the actor does, fresh for each caller."""
        try:
            return await asyncio.shield(self._made)
        except (AglError, StoreAway) as error:
            raise copy.copy(error) from error
