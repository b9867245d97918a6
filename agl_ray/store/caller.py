"""One command to the store, repeated while the store is away: the base of the client.

What it is: the transport, its deadlines, and the way a client is made (`connect`, `local`) and pickled.
Who calls it: `agl_ray.store.client.LightningStore` inherits it. Test alone: tests/integration/test_store_actor.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from agl_ray import waits
from agl_ray.store.core import StoreCore
from agl_ray.store.lane import ALONE, Command, Lanes
from agl_ray.store.transport import (
    ActorTransport,
    GatheringTransport,
    LocalTransport,
    StoreAway,
    Transport,
)
from agl_ray.types import NotFound, WaitTimeout

Client = TypeVar("Client", bound="StoreCaller")
T = TypeVar("T")


class StoreCaller:
    """answer_seconds: how long one answer may take. away_seconds: how long the store may be away (restarting) before a
    call gives up with WaitTimeout.
    """

    def __init__(
        self, transport: Transport, *, answer_seconds: float = 60.0, away_seconds: float = 60.0
    ) -> None:
        self._transport = transport
        self._answer_seconds = answer_seconds
        self._away_seconds = away_seconds
        self._gathering = transport if isinstance(transport, GatheringTransport) else None
        self._lanes = Lanes(self._send)

    def __reduce__(self) -> Any:
        return (_rebuilt, (type(self), self._transport, self._answer_seconds, self._away_seconds))

    @classmethod
    def connect(
        cls: type[Client],
        name: str = "store",
        namespace: str | None = None,
        *,
        answer_seconds: float = 60.0,
        away_seconds: float = 60.0,
    ) -> Client:
        """The store actor of this name; `namespace` None = the caller's own. NotFound where there is none."""
        import ray

        try:
            handle = ray.get_actor(name, namespace=namespace)
        except ValueError as error:
            raise NotFound(
                f"no store actor {name!r} in namespace {namespace!r}; has the run started, and is this its cluster?"
            ) from error
        namespace = namespace or ray.get_runtime_context().namespace
        transport = ActorTransport(handle, name, namespace)
        return cls(transport, answer_seconds=answer_seconds, away_seconds=away_seconds)

    @classmethod
    def local(cls: type[Client], core: StoreCore) -> Client:
        """Over a core of this process (`await StoreCore.open("memory://")`): tests, tools, debugging."""
        return cls(LocalTransport(core))

    @classmethod
    def http(
        cls: type[Client],
        url: str,
        api_key: str | None = None,
        *,
        answer_seconds: float = 60.0,
        away_seconds: float = 60.0,
    ) -> Client:
        """The store behind the door at `url` (`http://host:port`), from outside the cluster; InputError where that is no address."""
        from agl_ray.store.doors.http_transport import HttpTransport

        transport = HttpTransport(url, api_key)
        return cls(transport, answer_seconds=answer_seconds, away_seconds=away_seconds)

    @property
    def transport(self) -> Transport:
        """How this client reaches its store: what a door passes commands on to."""
        return self._transport

    @property
    def capabilities(self) -> dict[str, bool]:
        """thread_safe: usable from any thread and loop. async_safe: from many tasks at once. zero_copy: one store serves all
        processes. otlp_traces: it takes OTLP at `otlp_traces_endpoint()`."""
        return {
            "thread_safe": True,
            "async_safe": True,
            "zero_copy": not isinstance(self._transport, LocalTransport),
            "otlp_traces": self.otlp_traces_endpoint() is not None,
        }

    def otlp_traces_endpoint(self) -> str | None:
        """Where the store takes OTLP/HTTP traces: at the HTTP door that this client came through, None without one."""
        door: str | None = getattr(self._transport, "base_url", None)
        return None if door is None else f"{door}/v1/traces"

    async def _call(
        self,
        command: str,
        *arguments: Any,
        blocking: float = 0.0,
        repeat: tuple[Any, ...] | None = None,
        size: int = 0,
    ) -> Any:
        """One command, repeated while the store is away. `blocking`: seconds that the store may wait by itself.
        `repeat`: arguments of a repetition where they differ. `size`: bytes that it carries."""
        first: Command = (command, arguments)
        again: Command = first if repeat is None else (command, repeat)
        if not blocking and command not in ALONE and self._gathers():
            return await self._lanes.call(first, again, size)
        seconds = self._answer_seconds + blocking
        call = self._transport.call

        def ask(repeated: bool) -> Awaitable[Any]:
            name, given = again if repeated else first
            return call(name, *given, seconds=seconds)

        return await self._until_back(ask, command)

    def _gathers(self) -> bool:
        return self._gathering is not None and self._gathering.gathers()

    async def _send(self, first: Sequence[Command], again: Sequence[Command]) -> Sequence[Any]:
        """Carry the lane's commands."""
        seconds, transport = self._answer_seconds, self._gathering
        assert transport is not None

        async def ask(repeated: bool) -> Sequence[Any]:
            return await transport.call_many(again if repeated else first, seconds=seconds)

        return await self._until_back(ask, first[0][0])

    async def _until_back(self, ask: Callable[[bool], Awaitable[T]], command: str) -> T:
        """The answer to `ask(repeated)`, asked again while the store is away."""
        give_up: float | None = None
        pause = 0.05
        while True:
            try:
                return await ask(give_up is not None)
            except StoreAway as error:
                now = time.monotonic()
                give_up = now + self._away_seconds if give_up is None else give_up
                if now >= give_up:
                    on = f"the store to come back after a restart (to answer {command})"
                    raise WaitTimeout(on, self._away_seconds, str(error)) from error
            await waits.wait(
                asyncio.sleep(pause),
                on="the store to come back after a restart",
                seconds=pause + 60,
            )
            pause = min(2 * pause, 1.0)


def _rebuilt(
    kind: type[Client], transport: Transport, answer_seconds: float, away_seconds: float
) -> Client:
    return kind(transport, answer_seconds=answer_seconds, away_seconds=away_seconds)
