"""The connection to the store's process, and the messages on it."""

from __future__ import annotations

import asyncio
import gc
import struct
import warnings
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
import uvloop

from agl_ray.store.doors import wire
from agl_ray.store.doors.messages import answer_message, send_message
from agl_ray.store.link import Address, Frames, Link, LinkDoor, LinkLost, linked
from agl_ray.types import EnqueueRolloutRequest, InputError, NotFound, WaitTimeout

HOST = "127.0.0.1"
LOOPS = [asyncio.run, uvloop.run]


async def shout(body: bytes) -> bytes:
    return body.upper()


def over_a_link(
    scenario: Callable[[Link, LinkDoor], Awaitable[None]], answer: Any = shout
) -> Coroutine[Any, Any, None]:
    async def main() -> None:
        door = LinkDoor(answer)
        life = linked(await door.open(HOST))
        await scenario(await anext(life), door)
        await life.aclose()
        door.close()

    return main()


@pytest.mark.parametrize("run", LOOPS)
def test_each_message_has_its_own_answer_whatever_its_size(run: Any) -> None:
    async def scenario(link: Link, _door: LinkDoor) -> None:
        bodies = [b"", b"a", b"b" * 100, b"c" * 70_000, b"d" * 5_000_000]
        answers = await asyncio.gather(*(link.ask(one) for one in bodies * 3))
        assert answers == [one.upper() for one in bodies * 3]

    run(over_a_link(scenario))


def test_answers_come_in_any_order_and_a_cancelled_caller_hurts_nobody() -> None:
    begun: list[bytes] = []
    all_begun = asyncio.Event()
    gates = {name: asyncio.Event() for name in (b"a", b"b", b"c")}

    async def answer(body: bytes) -> bytes:
        begun.append(body)
        if len(begun) == len(gates):
            all_begun.set()
        await gates[body].wait()
        return body

    async def scenario(link: Link, _door: LinkDoor) -> None:
        a, b, c = (asyncio.create_task(link.ask(one)) for one in gates)
        await all_begun.wait()
        assert begun == [b"a", b"b", b"c"]
        gates[b"c"].set()
        assert await c == b"c"
        b.cancel()
        gates[b"b"].set()
        gates[b"a"].set()
        assert await a == b"a"
        with pytest.raises(asyncio.CancelledError):
            await b

    asyncio.run(over_a_link(scenario, answer))


@pytest.mark.parametrize("run", LOOPS)
def test_who_has_not_the_key_is_sent_away(run: Any) -> None:
    async def main() -> None:
        door = LinkDoor(shout)
        address = await door.open(HOST)
        wrong = linked(address._replace(key=b"x" * 32))
        link = await anext(wrong)
        with pytest.raises(LinkLost):
            await link.ask(b"a")
        reader, writer = await asyncio.open_connection(HOST, address.port)
        writer.write(struct.pack("<II", 10**9, 0) + b"x" * 100)  # no greeting is that long
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await asyncio.wait_for(reader.readexactly(1), 10)
        writer.close()
        await wrong.aclose()
        door.close()

    run(main())


def test_a_connection_that_ends_is_said_to_all_who_wait_on_it() -> None:
    async def never(_body: bytes) -> bytes:
        await asyncio.Event().wait()
        return b""

    async def scenario(link: Link, _door: LinkDoor) -> None:
        waiting = [asyncio.create_task(link.ask(b"a")) for _ in range(3)]
        await asyncio.sleep(0.01)
        link._transport.abort()  # type: ignore[union-attr]
        for one in waiting:
            with pytest.raises(LinkLost, match="ended"):
                await one
        assert link.lost
        with pytest.raises(LinkLost):
            await link.ask(b"b")

    asyncio.run(over_a_link(scenario, never))


def test_nobody_there_is_an_error_at_once() -> None:
    async def main() -> None:
        with pytest.raises((OSError, WaitTimeout)):
            await anext(linked(Address(HOST, 1, b"")))

    asyncio.run(main())


def test_a_connection_ends_with_its_loop() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        async def main() -> None:
            door = LinkDoor(shout)
            life.append(linked(await door.open(HOST)))
            assert await (await anext(life[0])).ask(b"a") == b"A"
            door.close()

        life: list[Any] = []
        asyncio.run(main())
        gc.collect()


def test_frames_cut_anywhere_are_put_together() -> None:
    bodies = [b"", b"abc", b"d" * 1000]
    data = b"".join(struct.pack("<II", len(one), place) + one for place, one in enumerate(bodies))
    for size in (1, 7, 8, 9, 500, len(data)):
        frames = Frames()
        pieces = [data[start : start + size] for start in range(0, len(data), size)]
        found = [frame for piece in pieces for frame in frames.feed(piece)]
        assert found == [*enumerate(bodies)]


def test_a_command_that_cannot_travel_fails_alone() -> None:
    async def run(commands: list[Any], seconds: float) -> list[Any]:
        assert seconds == 5.0
        return [NotFound("no such rollout") for _ in commands]

    async def carry(body: bytes) -> bytes:
        return await answer_message(run, body)

    async def main() -> None:
        bad = ("enqueue", ([EnqueueRolloutRequest(input=object())],))
        unread = ("get_state", (1,))
        missing = ("get_rollout", ("ro-none",))
        found = await send_message(carry, [missing, bad, unread, missing], 5.0)
        assert [type(one) for one in found] == [NotFound, InputError, InputError, NotFound]
        assert "cannot be sent" in str(found[1])
        assert [type(one) for one in await send_message(carry, [bad], 5.0)] == [InputError]

    asyncio.run(main())


def test_a_message_that_is_none_is_an_input_error() -> None:
    async def run(_commands: list[Any], _seconds: float) -> list[Any]:
        raise AssertionError("there is nothing to run")

    async def main() -> None:
        with pytest.raises(InputError, match="body of the call"):
            await answer_message(run, b"\xc1")
        empty = await answer_message(run, wire.encode_calls([], 1.0))
        assert wire.decode_answers([], empty) == []

    asyncio.run(main())
