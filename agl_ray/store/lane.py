"""Many commands of one process in few messages.

What it is: commands that are given while a message is on its way wait for the next one and travel in it together, begun by the store
in the order in which they were given; each is answered by its own result or error. A lone command leaves at once. A message to
another process costs about the same for one command as for fifty. Commands that block in the store, and those whose answers
are large, travel alone: they would keep the others waiting (`ALONE`).
Who calls it: `agl_ray.store.caller`; the answering side is `answer_each`. Test alone: tests/unit/test_store_lane.py.
"""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from agl_ray.types import AglError, StoreError

log = logging.getLogger("agl_ray.store")

IN_FLIGHT = 2  # messages on their way: one is carried out while the next one travels
MOST_COMMANDS = 256
MOST_BYTES = 8 * 2**20  # per message
COMMAND_BYTES = 1024  # what a command without payload counts for

ALONE = frozenset(
    (
        *(
            "close",
            "ping",
            "statistics",
            "forget",
            "wait_for_rollouts",
            "wait_for_queue",
            "read_events",
        ),
        *("read_spans", "find_rollouts", "find_attempts", "find_resources"),
    )
)

Command = tuple[str, tuple[Any, ...]]
"""(name of a coroutine of `StoreCore`, its arguments)"""
Send = Callable[[Sequence[Command], Sequence[Command]], Awaitable[Sequence[Any]]]
"""Carries commands to the store (the second list instead, where it must repeat them); per command its result or its error."""


class Item(NamedTuple):
    command: Command
    again: Command  # what a repetition says
    size: int
    answer: asyncio.Future[Any]


class Lanes:
    """One lane per event loop (a client may be used from several)."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._lanes: WeakKeyDictionary[asyncio.AbstractEventLoop, _Lane] = WeakKeyDictionary()

    async def call(self, command: Command, again: Command, size: int) -> Any:
        """The command's result, or its error raised. `size`: bytes that it carries."""
        loop = asyncio.get_running_loop()
        lane = self._lanes.get(loop)
        if lane is None:
            lane = self._lanes[loop] = _Lane(self._send)
        return await lane.call(loop, command, again, size)


class _Lane:
    """Holds at any moment between two callbacks of the loop: where a command waits, a sender or a lone caller is there who will look
    for it once more before he leaves."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._waiting: list[Item] = []
        self._senders: set[asyncio.Task[None]] = set()
        self._alone = False  # a lone command is on its way, carried by its own caller

    async def call(
        self, loop: asyncio.AbstractEventLoop, command: Command, again: Command, size: int
    ) -> Any:
        if not (self._alone or self._senders):
            return await self._call_alone(command, again)
        item = Item(command, again, size, loop.create_future())
        self._waiting.append(item)
        self._start_sender()
        return await item.answer

    def _start_sender(self) -> None:
        if self._waiting and len(self._senders) + self._alone < IN_FLIGHT:
            loop = asyncio.get_running_loop()
            self._senders.add(loop.create_task(self._send_all(), name="store-lane"))

    async def _call_alone(self, command: Command, again: Command) -> Any:
        self._alone = True
        try:
            (result,) = await self._send([command], [again])
        finally:
            self._alone = False
            self._start_sender()
        if isinstance(result, Exception):
            raise result
        return result

    async def _send_all(self) -> None:
        try:
            while self._waiting:
                await self._send_some()
        finally:
            # Now, and not by a callback of the task: those whom it has just answered give their next commands before that runs.
            me = asyncio.current_task()
            if me is not None:
                self._senders.discard(me)
            self._start_sender()

    async def _send_some(self) -> None:
        items = self._next()
        try:
            results = await self._send([one.command for one in items], [one.again for one in items])
        except Exception as error:  # noqa: BLE001 (the callers raise it)
            results = [copy.copy(error) for _ in items]
        except BaseException:
            for one in items:
                one.answer.cancel()
            raise
        for one, result in zip(items, results, strict=True):
            if one.answer.done():
                continue  # its caller was cancelled
            if isinstance(result, Exception):
                one.answer.set_exception(result)
            else:
                one.answer.set_result(result)

    def _next(self) -> list[Item]:
        size = number = 0
        for item in self._waiting[:MOST_COMMANDS]:
            size += COMMAND_BYTES + item.size
            if number and size > MOST_BYTES:
                break
            number += 1
        items, self._waiting = self._waiting[:number], self._waiting[number:]
        return items


async def answer_each(
    call: Callable[..., Awaitable[Any]], commands: Sequence[Command]
) -> list[Any]:
    """The store's side: run the commands, begun in their order; per command its result or its error."""
    works = (_answer(call, name, arguments) for name, arguments in commands)
    return await asyncio.gather(*works)


async def _answer(call: Callable[..., Awaitable[Any]], name: str, arguments: Sequence[Any]) -> Any:
    try:
        return await call(name, *arguments)
    except AglError as error:
        return error.with_traceback(None)
    except Exception as error:  # a bug in one command must not take the others' answers along
        log.exception("store: %s failed unexpectedly", name)
        return StoreError(f"store: {name} failed unexpectedly: {type(error).__name__}: {error}")
