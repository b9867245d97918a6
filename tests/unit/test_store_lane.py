"""The lane: what travels together, in which order, and who gets which answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from agl_ray.store import lane
from agl_ray.store.lane import Command, Lanes, answer_each
from agl_ray.types import NotFound, StoreError, WaitTimeout


class Wire:
    """Messages as they leave; each is answered when `gate` opens. A command `fail` is answered by an error."""

    def __init__(self) -> None:
        self.messages: list[list[str]] = []
        self.gate = asyncio.Event()
        self.error: Exception | None = None

    async def send(self, commands: Sequence[Command], _again: Sequence[Command]) -> list[Any]:
        self.messages.append([name for name, _ in commands])
        await asyncio.sleep(0)
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return [NotFound(name) if name == "fail" else name.upper() for name, _ in commands]


def begin(lanes: Lanes, *names: str, size: int = 0) -> list[asyncio.Task[Any]]:
    return [asyncio.ensure_future(lanes.call((one, ()), (one, ()), size)) for one in names]


async def turn() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_a_lone_command_leaves_at_once_and_the_rest_gathers() -> None:
    async def main() -> None:
        wire = Wire()
        lanes = Lanes(wire.send)
        tasks = begin(lanes, "a")
        await turn()
        assert wire.messages == [["a"]]
        tasks += begin(lanes, "b")
        await turn()
        tasks += begin(lanes, "c", "d", "e")
        await turn()
        assert wire.messages == [["a"], ["b"]]  # two are on their way, the others wait
        wire.gate.set()
        assert await asyncio.gather(*tasks) == ["A", "B", "C", "D", "E"]
        assert wire.messages == [["a"], ["b"], ["c", "d", "e"]]

    asyncio.run(main())


def test_what_is_given_in_one_turn_leaves_in_two_messages_in_order() -> None:
    async def main() -> None:
        wire = Wire()
        wire.gate.set()
        names = [f"n{i}" for i in range(40)]
        assert await asyncio.gather(*begin(Lanes(wire.send), *names)) == [n.upper() for n in names]
        assert wire.messages == [names[:1], names[1:]]

    asyncio.run(main())


def test_messages_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        wire = Wire()
        wire.gate.set()
        lanes = Lanes(wire.send)
        await asyncio.gather(*begin(lanes, *"abcdef"))
        await asyncio.gather(*begin(lanes, *"ghi", size=lane.MOST_BYTES))
        assert [len(one) for one in wire.messages] == [1, 2, 2, 1, 1, 1, 1]

    monkeypatch.setattr(lane, "MOST_COMMANDS", 2)
    asyncio.run(main())


def test_each_is_answered_by_its_own_result_or_error() -> None:
    async def main() -> None:
        wire = Wire()
        wire.gate.set()
        _, one, two, three = begin(Lanes(wire.send), "lone", "a", "fail", "c")
        with pytest.raises(NotFound, match="fail"):
            await two
        assert (await one, await three) == ("A", "C")

    asyncio.run(main())


def test_a_message_that_fails_fails_all_of_it_each_with_its_own_exception() -> None:
    async def main() -> None:
        wire = Wire()
        wire.error = WaitTimeout("the store", 5.0, "hint")
        wire.gate.set()
        tasks = begin(Lanes(wire.send), "lone", "a", "b")
        await asyncio.wait(tasks)
        errors = [one.exception() for one in tasks][1:]
        assert [str(one) for one in errors] == [str(wire.error)] * 2
        assert errors[0] is not errors[1]

    asyncio.run(main())


def test_a_cancelled_caller_hurts_nobody() -> None:
    async def main() -> None:
        wire = Wire()
        lone, one, two = begin(Lanes(wire.send), "lone", "a", "b")
        await turn()
        lone.cancel()
        one.cancel()
        await turn()
        wire.gate.set()
        assert await two == "B"
        assert lone.cancelled()
        assert one.cancelled()

    asyncio.run(main())


def test_the_answering_side_begins_in_order_and_keeps_errors_apart() -> None:
    begun: list[str] = []

    async def call(name: str, *arguments: Any) -> Any:
        begun.append(name)
        await asyncio.sleep(0.01 if name == "slow" else 0)
        if name == "unknown":
            raise NotFound("no such thing")
        if name == "bug":
            raise KeyError("x")
        return (name, *arguments)

    async def main() -> None:
        commands = [("slow", (1,)), ("unknown", ()), ("bug", ()), ("quick", (2, 3))]
        slow, unknown, bug, quick = await answer_each(call, commands)
        assert begun == ["slow", "unknown", "bug", "quick"]
        assert (slow, quick) == (("slow", 1), ("quick", 2, 3))
        assert isinstance(unknown, NotFound)
        assert isinstance(bug, StoreError)
        assert "bug failed unexpectedly: KeyError" in str(bug)

    asyncio.run(main())


def test_commands_given_in_the_moment_of_an_answer_are_not_left_behind() -> None:
    """Callers whose next command follows at once on the last one's answer, while a lone command is still on its way."""

    async def main() -> None:
        gates = {"slow": asyncio.Event(), "first": asyncio.Event(), "second": asyncio.Event()}
        gates["second"].set()

        async def send(commands: Sequence[Command], _again: Sequence[Command]) -> list[Any]:
            await gates[commands[0][0]].wait()
            return [name for name, _ in commands]

        lanes = Lanes(send)

        async def two_in_a_row() -> list[str]:
            return [await lanes.call((one, ()), (one, ()), 0) for one in ("first", "second")]

        lone = begin(lanes, "slow")
        await turn()
        callers = [asyncio.ensure_future(two_in_a_row()) for _ in range(7)]
        await turn()
        gates["first"].set()
        await turn()
        answers = await asyncio.wait_for(asyncio.gather(*callers), 60)
        assert answers == [["first", "second"]] * 7
        assert not lone[0].done()
        gates["slow"].set()
        assert await asyncio.wait_for(lone[0], 60) == "slow"

    asyncio.run(main())


def test_a_lone_caller_sees_to_those_who_waited_meanwhile() -> None:
    async def main() -> None:
        wire = Wire()
        lanes = Lanes(wire.send)
        first = begin(lanes, "a")
        await turn()
        rest = begin(lanes, "b", "c")
        await turn()
        first[0].cancel()
        await turn()
        more = begin(lanes, "d", "e")
        wire.gate.set()
        assert await asyncio.wait_for(asyncio.gather(*rest, *more), 60) == ["B", "C", "D", "E"]

    asyncio.run(main())
