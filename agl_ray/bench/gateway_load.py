"""The callers of the gateway's benchmark: conversations over plain HTTP, one after the other or many at once.

The same bodies go to our gateway, to the echo and to a bare vLLM; only what is done with the answer differs. Called by
`agl_ray.bench.gateway`. Test alone: tests/unit/test_bench_gateway.py.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import msgspec

from agl_ray.bench.gateway_keys import Size
from agl_ray.bench.gateway_parts import words
from agl_ray.types import RunError
from agl_ray.waits import wait

CALL_SECONDS = 120.0
MODEL = "bench"
TOKENS_A_WORD = 1.4  # of the made-up words, by the benchmark's tokenizer


class Load(NamedTuple):
    """seconds: of each call, in order of their ends."""

    took: list[float]
    wall: float

    @property
    def per_s(self) -> float:
        return len(self.took) / self.wall

    def quantile_ms(self, share: float) -> float:
        ordered = sorted(self.took)
        return 1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def text(seed: int, tokens: int) -> str:
    """Words of about so many tokens."""
    return words(seed, max(1, round(tokens / TOKENS_A_WORD)))


class Caller:
    """Conversations of one size. `echoes`: the other side gives the body back, so the caller makes up the answers itself."""

    def __init__(self, session: Any, size: Size, *, echoes: bool = False, seed: int = 0) -> None:
        self._session, self._size, self._echoes = session, size, echoes
        self._said = text(1, size.response)
        self._added = text(2, size.added) if size.added else ""
        self._numbers = itertools.count(seed)
        self.took: list[float] = []

    async def converse(self, url: str, turns: int | None = None) -> list[dict[str, Any]]:
        """One conversation of `turns` calls (the size's own number where None) at the chat completions of base URL `url`."""
        number = next(self._numbers)
        first = text(1000 + number // self._size.group, self._size.prompt)
        messages = [{"role": "user", "content": first}]
        for _ in range(turns or self._size.turns):
            answer = await self._call(url, messages)
            messages += [
                {"role": "assistant", "content": answer},
                {"role": "user", "content": self._added},
            ]
        return messages

    async def _call(self, url: str, messages: list[dict[str, Any]]) -> str:
        body = msgspec.json.encode(
            {"model": MODEL, "messages": messages, "max_tokens": self._size.response}
        )
        begin = time.perf_counter()
        status, answer = await wait(
            self._post(f"{url}/chat/completions", body),
            on=f"the answer of {url}",
            seconds=CALL_SECONDS,
        )
        self.took.append(time.perf_counter() - begin)
        if status != 200:
            raise RunError(f"{url} answered {status}: {answer[:500]!r}")
        if self._echoes:
            return self._said
        content: str = msgspec.json.decode(answer)["choices"][0]["message"]["content"]
        return content

    async def _post(self, url: str, body: bytes) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json"}
        async with self._session.post(url, data=body, headers=headers) as answer:
            return answer.status, await answer.read()


@asynccontextmanager
async def http_session(in_flight: int) -> AsyncIterator[Any]:
    import aiohttp

    connector = aiohttp.TCPConnector(limit=in_flight)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield session


async def run_load(
    caller: Caller,
    places: Iterable[Callable[[], Awaitable[str]]],
    in_flight: int,
    turns: int | None = None,
) -> Load:
    """Hold a conversation at each of `places` (functions that make a base URL), so many at once."""
    left = iter(places)
    caller.took.clear()

    async def work() -> None:
        for place in left:
            await caller.converse(await place(), turns)

    begin = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(in_flight)))
    return Load(list(caller.took), time.perf_counter() - begin)
