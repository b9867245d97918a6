"""The calculator agent with Anthropic's own client: messages."""

from __future__ import annotations

from typing import Any

from anthropic import AsyncAnthropic
from shared import SYSTEM_PROMPT, Options, calculator, main

TOOL: Any = {
    "name": "calculator",
    "description": "Evaluate one operation of two whole numbers.",
    "input_schema": {
        "type": "object",
        "properties": {"expression": {"type": "string"}},
        "required": ["expression"],
    },
}


async def agent(options: Options) -> list[str]:
    client, answers = AsyncAnthropic(), []
    messages: list[Any] = []
    asked = {"model": options.model, "max_tokens": 1000, "system": SYSTEM_PROMPT, "tools": [TOOL]}
    for question in options.questions:
        messages.append({"role": "user", "content": question})
        while True:
            if options.stream:
                async with client.messages.stream(**asked, messages=messages) as stream:
                    message = await stream.get_final_message()
            else:
                message = await client.messages.create(**asked, messages=messages)
            messages.append({"role": "assistant", "content": message.content})
            calls = [block for block in message.content if block.type == "tool_use"]
            if not calls:
                break
            results = [
                {
                    "type": "tool_result",
                    "tool_use_id": call.id,
                    "content": calculator(**call.input),
                }
                for call in calls
            ]
            messages.append({"role": "user", "content": results})
        answers.append(message.content[-1].text)
    return answers


if __name__ == "__main__":
    main(agent, "messages")
