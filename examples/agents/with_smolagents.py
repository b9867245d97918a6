"""The calculator agent with smolagents: chat completions. It asks for a tool call in every step (`tool_choice: required`)."""

from __future__ import annotations

import asyncio
import os

from shared import SYSTEM_PROMPT, Options, calculator, main
from smolagents import OpenAIModel, ToolCallingAgent, tool


async def agent(options: Options) -> list[str]:
    model = OpenAIModel(
        options.model, os.environ["OPENAI_BASE_URL"], api_key=os.environ["OPENAI_API_KEY"]
    )
    helper = ToolCallingAgent(
        [tool(calculator)],
        model,
        instructions=SYSTEM_PROMPT,
        max_steps=4,
        stream_outputs=options.stream,
        verbosity_level=0,
    )
    return [
        await asyncio.to_thread(helper.run, question, reset=False) for question in options.questions
    ]


if __name__ == "__main__":
    main(agent, "chat")
