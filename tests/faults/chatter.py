"""An agent that asks the model once or twice and is rewarded by the parity of what came back: signal without skill."""

from __future__ import annotations

from typing import Any

from openai import AsyncOpenAI

import agl_ray as agl

CLIENTS: dict[int, AsyncOpenAI] = {}


@agl.rollout
async def chatter(task: dict[str, Any], llm: agl.LLM) -> float:
    shared = CLIENTS.setdefault(0, AsyncOpenAI(api_key="unset"))
    client = shared.with_options(base_url=llm.endpoint, api_key=llm.api_key or "none")
    messages: list[Any] = [{"role": "user", "content": task["question"]}]
    text = ""
    for _ in range(task["turns"]):
        completion = await client.chat.completions.create(model=llm.model, messages=messages)
        text = completion.choices[0].message.content or ""
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "go on"}]
    return float(sum(text.encode()) % 2)


def rows(seed: int) -> list[dict[str, Any]]:
    return [{"question": f"say {i + seed}", "turns": 1 + i % 2} for i in range(64)]
