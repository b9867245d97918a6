"""The calculator agent with the OpenAI Agents SDK: responses (its default) or chat completions."""

from __future__ import annotations

from agents import (
    Agent,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    SQLiteSession,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from shared import SYSTEM_PROMPT, Options, calculator, main

MODELS = {"responses": OpenAIResponsesModel, "chat": OpenAIChatCompletionsModel}


async def agent(options: Options) -> list[str]:
    set_tracing_disabled(True)  # it would send its traces to OpenAI
    model = MODELS[options.api](model=options.model, openai_client=AsyncOpenAI())
    tools = [function_tool(calculator)]
    helper = Agent(name="calculator", instructions=SYSTEM_PROMPT, model=model, tools=tools)
    session, answers = SQLiteSession("conversation"), []
    for question in options.questions:
        if options.stream:
            result = Runner.run_streamed(helper, question, session=session)
            async for _ in result.stream_events():
                pass
        else:
            result = await Runner.run(helper, question, session=session)
        answers.append(result.final_output)
    return answers


if __name__ == "__main__":
    main(agent, "responses", "chat")
