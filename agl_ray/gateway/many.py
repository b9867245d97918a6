"""`n` answers to one prompt: n calls side by side, each with its own id, its own seed and its own span.

Whole answers come together, and the first refusal refuses all; pieces of streams come as they are made, each with the `index` of its
answer. Where one fails the others are cancelled. Called by: `agl_ray/gateway/http.py`. Test alone: `pytest tests/unit/test_gateway_many.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any

import msgspec

from agl_ray.gateway.caller import CallPath
from agl_ray.gateway.canonical import CallRequest, CallResult, Streamed
from agl_ray.gateway.door import Door

Piece = Streamed | CallResult


async def answers(door: Door, path: CallPath, request: CallRequest) -> list[CallResult]:
    """The `request.n` answers, in order of their index."""
    if request.n == 1:
        return [await door.call(path, request)]
    async with _side_by_side([door.call(path, one) for one in _each(request)]) as tasks:
        results: list[CallResult] = await asyncio.gather(*tasks)
    return [_numbered(result, index) for index, result in enumerate(results)]


async def pieces(door: Door, path: CallPath, request: CallRequest) -> AsyncGenerator[Piece, None]:
    """The pieces of all `request.n` answers; those of one are in order, its CallResult is the last of them."""
    if request.n == 1:
        async with aclosing(door.call_stream(path, request)) as stream:
            async for piece in stream:
                yield piece
        return
    # One place: an answer that is not read is not sampled ahead without end.
    queue: asyncio.Queue[Piece | None] = asyncio.Queue(1)

    async def pump(index: int, one: CallRequest) -> None:
        try:
            async with aclosing(door.call_stream(path, one)) as stream:
                async for piece in stream:
                    await queue.put(_numbered(piece, index))
        finally:
            if not _cancelled():
                await queue.put(None)

    works = [pump(index, one) for index, one in enumerate(_each(request))]
    async with _side_by_side(works) as tasks:
        left = len(tasks)
        while left:
            found = await queue.get()
            if found is not None:
                yield found
                continue
            left -= 1
            for task in tasks:
                if task.done():
                    task.result()  # a refusal ends all
        await asyncio.gather(*tasks)


def _each(request: CallRequest) -> list[CallRequest]:
    """The calls that a request stands for."""
    return [
        msgspec.structs.replace(request, n=1, sampling=_sampling(request, index))
        for index in range(request.n)
    ]


def _sampling(request: CallRequest, index: int) -> dict[str, Any]:
    """With one seed all answers would be the same."""
    seed = request.sampling.get("seed")
    return request.sampling if seed is None else {**request.sampling, "seed": seed + index}


def _numbered(piece: Any, index: int) -> Any:
    return msgspec.structs.replace(piece, index=index)


def _cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


@asynccontextmanager
async def _side_by_side(
    works: list[Coroutine[Any, Any, Any]],
) -> AsyncGenerator[list[asyncio.Task[Any]], None]:
    """The works as tasks, none of which outlives the block."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
