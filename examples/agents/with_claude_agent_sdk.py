"""The calculator agent with the Claude Agent SDK, whose engine is the program that the SDK brings: messages, always streamed."""

from __future__ import annotations

from typing import Any

from claude_agent_sdk import (
    ClaudeAgentOptions,
    ClaudeSDKClient,
    ResultMessage,
    create_sdk_mcp_server,
    tool,
)
from shared import SYSTEM_PROMPT, Options, calculator, main


@tool("calculator", "Evaluate one operation of two whole numbers.", {"expression": str})
async def calculate(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": calculator(arguments["expression"])}]}


async def agent(options: Options) -> list[str]:
    settings = ClaudeAgentOptions(
        model=options.model,
        system_prompt=SYSTEM_PROMPT,
        tools=[],  # none of its own
        mcp_servers={"own": create_sdk_mcp_server("own", tools=[calculate])},
        allowed_tools=["mcp__own__calculator"],
        setting_sources=[],
        include_partial_messages=options.stream,
        max_turns=6,
    )
    answers = []
    async with ClaudeSDKClient(settings) as client:
        for question in options.questions:
            await client.query(question)
            async for message in client.receive_response():
                if isinstance(message, ResultMessage):
                    answers.append(message.result)
    return answers


if __name__ == "__main__":
    main(agent, "messages")
