"""Agents as they are written for agentlightning 0.3: a function under @rollout and a class. The test changes their import, nothing else."""

from __future__ import annotations

import json
from typing import Any, cast

import agentlightning as agl
from openai import AsyncOpenAI, OpenAI

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "calculator",
            "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
        },
    }
]


def tool_message(call: Any) -> dict[str, Any]:
    left, right = json.loads(call.function.arguments)["expression"].split("+")
    return {"role": "tool", "tool_call_id": call.id, "content": str(int(left) + int(right))}


@agl.rollout
def calculator(task: dict[str, Any], llm: agl.LLM, rollout: agl.Rollout) -> None:
    """Several turns with a tool; the reward is emitted."""
    client = OpenAI(base_url=llm.endpoint, api_key=llm.api_key or "dummy")
    messages: list[Any] = [{"role": "user", "content": task["question"]}]
    answer = ""
    for _ in range(4):
        completion = client.chat.completions.create(model=llm.model, messages=messages, tools=TOOLS)
        message = completion.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            answer = message.content or ""
            break
        messages += [tool_message(call) for call in message.tool_calls]
    agl.emit_reward(1.0 if rollout.input["answer"] in answer else 0.0)


class Checker(agl.LitAgent[dict[str, Any]]):
    """Asks, asks whether it is sure, and returns the reward; validates with one question only."""

    def __init__(self, num_turns: int = 2) -> None:
        super().__init__()
        self.num_turns = num_turns

    async def training_rollout_async(
        self, task: dict[str, Any], resources: agl.NamedResources, rollout: agl.Rollout
    ) -> float | None:
        return await self.converse(task, resources, rollout, self.num_turns)

    async def validation_rollout_async(
        self, task: dict[str, Any], resources: agl.NamedResources, rollout: agl.Rollout
    ) -> float | None:
        return await self.converse(task, resources, rollout, 1)

    async def converse(
        self, task: dict[str, Any], resources: agl.NamedResources, rollout: agl.Rollout, turns: int
    ) -> float:
        llm = cast(agl.LLM, resources["main_llm"])
        attempted = cast(agl.AttemptedRollout, rollout)
        client = AsyncOpenAI(
            base_url=llm.get_base_url(attempted.rollout_id, attempted.attempt.attempt_id),
            api_key=llm.api_key or "dummy",
        )
        messages: list[Any] = [{"role": "user", "content": task["question"]}]
        answer = ""
        for _ in range(turns):
            completion = await client.chat.completions.create(model=llm.model, messages=messages)
            answer = completion.choices[0].message.content or ""
            messages += [
                {"role": "assistant", "content": answer},
                {"role": "user", "content": "Are you sure?"},
            ]
        return float(task["answer"] in answer)
