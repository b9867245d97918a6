"""The calculator agent with OpenAI's own client: chat completions or responses."""

from __future__ import annotations

import json
from typing import Any

from openai import AsyncOpenAI
from shared import SYSTEM_PROMPT, Options, calculator, main

SCHEMA = {
    "type": "object",
    "properties": {"expression": {"type": "string"}},
    "required": ["expression"],
}


async def chat(options: Options) -> list[str]:
    """Chat completions: the client keeps the messages."""
    client, answers = AsyncOpenAI(), []
    tool: Any = {"type": "function", "function": {"name": "calculator", "parameters": SCHEMA}}
    messages: list[Any] = [{"role": "system", "content": SYSTEM_PROMPT}]
    for question in options.questions:
        messages.append({"role": "user", "content": question})
        while True:
            asked = {"model": options.model, "messages": messages, "tools": [tool]}
            if options.stream:
                async with client.chat.completions.stream(**asked) as stream:
                    completion: Any = await stream.get_final_completion()
            else:
                completion = await client.chat.completions.create(**asked)
            message = completion.choices[0].message
            messages.append(message.model_dump(exclude_none=True))
            if not message.tool_calls:
                break
            for call in message.tool_calls:
                result = calculator(**json.loads(call.function.arguments))
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        answers.append(message.content)
    return answers


async def responses(options: Options) -> list[str]:
    """Responses: the server keeps the conversation, the client sends what is new."""
    client, answers = AsyncOpenAI(), []
    tool: Any = {"type": "function", "name": "calculator", "parameters": SCHEMA, "strict": False}
    previous: str | None = None
    for question in options.questions:
        items: Any = [{"role": "user", "content": question}]
        while items:
            asked = {"model": options.model, "input": items, "tools": [tool]}
            asked |= {"instructions": SYSTEM_PROMPT}
            if previous is not None:
                asked["previous_response_id"] = previous
            if options.stream:
                async with client.responses.stream(**asked) as stream:
                    response: Any = await stream.get_final_response()
            else:
                response = await client.responses.create(**asked)
            previous = response.id
            items = [
                {
                    "type": "function_call_output",
                    "call_id": item.call_id,
                    "output": calculator(**json.loads(item.arguments)),
                }
                for item in response.output
                if item.type == "function_call"
            ]
        answers.append(response.output_text)
    return answers


async def agent(options: Options) -> list[str]:
    return await (chat if options.api == "chat" else responses)(options)


if __name__ == "__main__":
    main(agent, "chat", "responses")
