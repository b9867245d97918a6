"""The calculator agent with pydantic-ai: chat completions, responses or Anthropic's messages."""

from __future__ import annotations

from collections.abc import AsyncIterable

from pydantic_ai import Agent, RunContext
from shared import SYSTEM_PROMPT, Options, calculator, main

MODELS = {"chat": "openai-chat", "responses": "openai-responses", "messages": "anthropic"}


async def agent(options: Options) -> list[str]:
    helper = Agent(
        f"{MODELS[options.api]}:{options.model}", instructions=SYSTEM_PROMPT, tools=[calculator]
    )
    answers, history = [], []
    for question in options.questions:
        result = await helper.run(
            question,
            message_history=history,
            event_stream_handler=watch if options.stream else None,
        )
        answers.append(result.output)
        history = result.all_messages()
    return answers


async def watch(_: RunContext, events: AsyncIterable) -> None:
    """Having somebody who watches the events makes pydantic-ai stream."""
    async for _event in events:
        pass


if __name__ == "__main__":
    main(agent, "chat", "responses", "messages")
