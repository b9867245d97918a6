"""The benchmark's own agent: two short model calls, the second continuing the first; the reward is the parity of the answer.

A model without any skill gives it both rewards, so that every group has signal and the learner has work.
"""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import agl_ray as agl


@functools.lru_cache(maxsize=4)
def shared_client(loop: asyncio.AbstractEventLoop) -> Any:
    from openai import AsyncOpenAI

    return AsyncOpenAI(api_key="unset")


@agl.rollout
async def chatter(task: dict[str, Any], llm: agl.LLM) -> float:
    """0 or 1, by the parity of the bytes of the second answer."""
    shared = shared_client(asyncio.get_running_loop())
    client = shared.with_options(base_url=llm.endpoint, api_key=llm.api_key or "none")
    messages: list[Any] = [{"role": "user", "content": task["question"]}]
    text = ""
    for _ in range(2):
        completion = await client.chat.completions.create(model=llm.model, messages=messages)
        text = completion.choices[0].message.content or ""
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "go on"}]
    return float(sum(text.encode()) % 2)


def rows(seed: int) -> list[dict[str, Any]]:
    """64 questions."""
    return [{"question": f"what is {i} plus {seed}?"} for i in range(64)]
