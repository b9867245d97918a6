"""The calculator agent with Microsoft's Agent Framework: responses (its default) or chat completions."""

from __future__ import annotations

from agent_framework import Agent, tool
from agent_framework.openai import OpenAIChatClient, OpenAIChatCompletionClient
from shared import SYSTEM_PROMPT, Options, calculator, main

CLIENTS = {"responses": OpenAIChatClient, "chat": OpenAIChatCompletionClient}


async def agent(options: Options) -> list[str]:
    client = CLIENTS[options.api](model=options.model)
    helper = Agent(client, SYSTEM_PROMPT, tools=[tool(calculator, approval_mode="never_require")])
    session, answers = helper.create_session(), []
    for question in options.questions:
        if options.stream:
            answer = await helper.run(question, session=session, stream=True).get_final_response()
        else:
            answer = await helper.run(question, session=session)
        answers.append(answer.messages[-1].text)
    return answers


if __name__ == "__main__":
    main(agent, "responses", "chat")
