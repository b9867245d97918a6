"""The calculator agent with AutoGen: chat completions."""

from __future__ import annotations

from autogen_agentchat.agents import AssistantAgent
from autogen_ext.models.openai import OpenAIChatCompletionClient
from shared import SYSTEM_PROMPT, Options, calculator, main

MODEL_INFO = {
    "vision": False,
    "function_calling": True,
    "json_output": False,
    "structured_output": False,
    "multiple_system_messages": False,
    "family": "unknown",
}


async def agent(options: Options) -> list[str]:
    helper = AssistantAgent(
        "helper",
        model_client=OpenAIChatCompletionClient(model=options.model, model_info=MODEL_INFO),
        tools=[calculator],
        system_message=SYSTEM_PROMPT,
        max_tool_iterations=5,
        model_client_stream=options.stream,
    )
    answers = []
    for question in options.questions:
        result = await helper.run(task=question)
        answers.append(result.messages[-1].content)
    return answers


if __name__ == "__main__":
    main(agent, "chat")
