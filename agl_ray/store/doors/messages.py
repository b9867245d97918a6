"""Messages of several commands as bytes, on both sides: over the link, inside a call of the store's actor, in an HTTP request.

Who calls it: `agl_ray.store.transport`, `agl_ray.store.doors.http_transport` (clients); `actors.store`, `agl_ray.store.doors.rpc`
(the store). Test alone: tests/unit/test_store_link.py.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from agl_ray.store.doors import wire
from agl_ray.store.lane import Command
from agl_ray.types import AglError, InputError

Carry = Callable[[bytes], Awaitable[bytes]]
Run = Callable[[list[Command], float], Awaitable[Sequence[Any]]]
"""Carries out commands whose caller waits so many seconds; per command its result or its error."""


async def send_message(carry: Carry, commands: Sequence[Command], seconds: float) -> list[Any]:
    """Per command its result or its error. One that cannot travel has its InputError, and the others go without it.

    msgspec.MsgspecError where the answer is none of a store."""
    try:
        body, refused = wire.encode_calls(commands, seconds), {}
    except InputError:
        refused = _refused(commands)
        if len(refused) == len(commands):
            return list(refused.values())
        left = [one for place, one in enumerate(commands) if place not in refused]
        body = wire.encode_calls(left, seconds)
    answer = await carry(body)
    names = [name for place, (name, _) in enumerate(commands) if place not in refused]
    found = iter(wire.decode_answers(names, answer))
    return [refused[place] if place in refused else next(found) for place in range(len(commands))]


def _refused(commands: Sequence[Command]) -> dict[int, InputError]:
    """By place what is wrong with those that cannot travel."""
    refused = {}
    for place, command in enumerate(commands):
        try:
            wire.encode_calls([command], 1.0)
        except InputError as error:
            refused[place] = error
    return refused


async def answer_message(run: Run, body: bytes) -> bytes:
    """The answer to a message, in the order of its commands; what could not be read is its own error. What `run` raises, this does."""
    calls, seconds = wire.decode_calls(body)
    given = [(one[0], tuple(one[1])) for one in calls if not isinstance(one, AglError)]
    found = iter(await run(given, seconds) if given else [])
    return wire.encode_answers([one if isinstance(one, AglError) else next(found) for one in calls])
