"""The calculator agent with CrewAI: chat completions or responses."""

from __future__ import annotations

import os

from crewai import LLM, Agent
from crewai.tools import tool
from shared import SYSTEM_PROMPT, Options, calculator, main

APIS = {"chat": "completions", "responses": "responses"}


async def agent(options: Options) -> list[str]:
    llm = LLM(
        model=f"openai/{options.model}",
        base_url=os.environ["OPENAI_BASE_URL"],
        api_key=os.environ["OPENAI_API_KEY"],
        api=APIS[options.api],
        stream=options.stream,
    )
    helper = Agent(
        role="calculator",
        goal="Right answers.",
        backstory=SYSTEM_PROMPT,
        llm=llm,
        tools=[tool(calculator)],
    )
    answers, messages = [], []
    for question in options.questions:
        messages.append({"role": "user", "content": question})
        result = await helper.kickoff_async(messages)
        answers.append(result.raw)
        messages = [message for message in result.messages if message["role"] != "system"]
    return answers


if __name__ == "__main__":
    main(agent, "chat", "responses")
