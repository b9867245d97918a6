"""The short way to an engine replica: answers, errors, cancellation and ends as over Serve's handle; Serve chooses, the link carries."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import pytest

from agl_ray.gateway import engine_link
from agl_ray.gateway.engine_api import GenerateChunk, GenerateRequest, GenerateResult
from agl_ray.gateway.engine_link import Busy, EngineDoor, EngineLink, EngineLinks
from agl_ray.store.link import Address, LinkLost, connected
from agl_ray.types import EngineError, InputError

HOST = "127.0.0.1"


class Engine:
    """Counts down from the prompt's first id; a prompt of one of the ids below fails or never ends."""

    def __init__(self) -> None:
        self.begun, self.aborted = asyncio.Event(), asyncio.Event()
        self.requests: list[GenerateRequest] = []

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        self.requests.append(request)
        await self._misbehave(request.prompt_ids[0])
        ids = list(range(request.prompt_ids[0]))
        return GenerateResult(
            response_ids=ids,
            logprobs=[-0.1] * len(ids),
            weight_versions=[(0, 3)],
            finish_reason="stop",
            stop_reason="END",
        )

    async def generate_stream(
        self, request: GenerateRequest
    ) -> AsyncGenerator[GenerateChunk, None]:
        for number in range(3):
            yield GenerateChunk(response_ids=[number], logprobs=[-0.1])
        await self._misbehave(request.prompt_ids[0])
        yield GenerateChunk(response_ids=[3], logprobs=[-0.1], finish_reason="length")

    async def _misbehave(self, wish: int) -> None:
        self.begun.set()
        if wish == 10_001:
            raise EngineError("the core died")
        if wish == 10_002:
            raise InputError("the prompt is too long")
        if wish == 10_003:
            raise KeyError("a bug")
        if wish == 10_004:
            try:
                await asyncio.Event().wait()
            finally:
                self.aborted.set()


def request(first: int, **fields: Any) -> GenerateRequest:
    return GenerateRequest(request_id="a", prompt_ids=[first], max_tokens=5, **fields)


def with_link(scenario: Callable[[EngineLink, Engine], Awaitable[None]], most: int = 10) -> None:
    async def main() -> None:
        engine = Engine()
        door = EngineDoor(engine, most)
        place = await door.place(HOST)
        assert place is not None
        life = connected(Address(*place), EngineLink)
        await asyncio.wait_for(scenario(await anext(life), engine), 120)
        await life.aclose()
        await closed(door)

    asyncio.run(main())


async def closed(*doors: EngineDoor) -> None:
    for door in doors:
        door.close()
    await asyncio.sleep(0.01)  # the ends of their connections


async def all_of(stream: AsyncGenerator[GenerateChunk, None], into: list[GenerateChunk]) -> None:
    async for chunk in stream:
        into.append(chunk)


def test_answers_are_what_the_engine_said() -> None:
    async def scenario(link: EngineLink, engine: Engine) -> None:
        asked = request(9000, stop=["x"], structure={"json": {"a": [1]}}, seed=7, session="s")
        many = await asyncio.gather(
            link.generate(asked), *(link.generate(request(3)) for _ in "ab")
        )
        assert [len(one.response_ids) for one in many] == [9000, 3, 3]
        assert many[0] == await engine.generate(asked)
        assert engine.requests[0] == asked
        chunks = [chunk async for chunk in link.generate_stream(request(1))]
        assert [chunk.response_ids for chunk in chunks] == [[0], [1], [2], [3]]
        assert [chunk.finish_reason for chunk in chunks] == [None, None, None, "length"]

    with_link(scenario)


@pytest.mark.parametrize(
    ("wish", "kind", "words"),
    [
        (10_001, EngineError, "the core died"),
        (10_002, InputError, "the prompt is too long"),
        (10_003, EngineError, r"the engine failed: KeyError\('a bug'\)"),
    ],
)
def test_errors_are_the_engine_s_own(wish: int, kind: type[Exception], words: str) -> None:
    async def scenario(link: EngineLink, engine: Engine) -> None:
        with pytest.raises(kind, match=words):
            await link.generate(request(wish))
        seen: list[GenerateChunk] = []
        with pytest.raises(kind, match=words):
            await all_of(link.generate_stream(request(wish)), seen)
        assert len(seen) == 3
        assert len((await link.generate(request(2))).response_ids) == 2

    with_link(scenario)


def test_a_cancelled_call_is_aborted_in_the_engine() -> None:
    async def scenario(link: EngineLink, engine: Engine) -> None:
        call = asyncio.create_task(link.generate(request(10_004)))
        await engine.begun.wait()
        call.cancel()
        await engine.aborted.wait()
        with pytest.raises(asyncio.CancelledError):
            await call
        engine.aborted.clear()
        stream = link.generate_stream(request(10_004))
        assert (await anext(stream)).response_ids == [0]
        await anext(stream)
        await anext(stream)
        await stream.aclose()
        await engine.aborted.wait()

    with_link(scenario)


def test_a_gateway_that_is_gone_leaves_no_work_behind() -> None:
    async def scenario(link: EngineLink, engine: Engine) -> None:
        call = asyncio.create_task(link.generate(request(10_004)))
        stream = link.generate_stream(request(10_004))
        await anext(stream)
        await engine.begun.wait()
        assert link._transport is not None
        link._transport.abort()
        with pytest.raises(LinkLost):
            await call
        with pytest.raises(LinkLost):
            await all_of(stream, [])
        await engine.aborted.wait()
        with pytest.raises(LinkLost):
            await link.generate(request(1))

    with_link(scenario)


def test_a_full_replica_says_so_and_begins_nothing() -> None:
    async def scenario(link: EngineLink, engine: Engine) -> None:
        call = asyncio.create_task(link.generate(request(10_004)))
        await engine.begun.wait()
        with pytest.raises(Busy):
            await link.generate(request(1))
        with pytest.raises(Busy):
            await anext(link.generate_stream(request(1)))
        assert len(engine.requests) == 1
        call.cancel()
        await engine.aborted.wait()
        await asyncio.sleep(0)
        assert len((await link.generate(request(1))).response_ids) == 1

    with_link(scenario, most=1)


async def link_of(links: EngineLinks, session: str) -> EngineLink:
    for _ in range(12_000):
        if (link := links.of(session)) is not None:
            return link
        await asyncio.sleep(0.005)
    raise AssertionError("no connection within 60 s")


def test_sessions_stay_with_the_replica_that_answered_them_first() -> None:
    async def main() -> None:
        doors = [EngineDoor(Engine(), 10) for _ in range(2)]
        one, two = [await door.place(HOST) for door in doors]
        links = EngineLinks(replicas=2)
        assert links.of("a") is None
        links.learn("a", one)
        links.learn("b", two)
        links.learn("c", None)
        a, b = await link_of(links, "a"), await link_of(links, "b")
        assert a is not b
        assert links.of("c") is None
        links.learn("d", one)
        assert links.of("d") is a
        a._transport.abort()  # type: ignore[union-attr]
        await asyncio.sleep(0.01)
        assert (links.of("a"), links.of("d"), links.of("b")) == (None, None, b)
        links.learn("a", one)
        assert await link_of(links, "a") is not a
        await closed(*doors)

    asyncio.run(main())


def test_a_lone_replica_is_known_to_all_sessions() -> None:
    async def main() -> None:
        door = EngineDoor(Engine(), 10)
        links = EngineLinks(replicas=1)
        links.learn("a", (HOST, 1, b"k" * 32))  # nobody listens there
        for _ in range(50):
            await asyncio.sleep(0)
            assert links.of("a") is None
        links.learn("b", await door.place(HOST))
        link = await link_of(links, "a")
        assert links.of("z") is link
        await closed(door)

    asyncio.run(main())


def test_what_is_remembered_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        door = EngineDoor(Engine(), 10)
        place = await door.place(HOST)
        links = EngineLinks(replicas=2)
        for number in range(5):
            links.learn(str(number), place)
        await link_of(links, "4")
        assert [links.of(str(number)) is None for number in range(5)] == [True] * 3 + [False] * 2
        await closed(door)

    monkeypatch.setattr(engine_link, "MOST_SESSIONS", 2)
    asyncio.run(main())
