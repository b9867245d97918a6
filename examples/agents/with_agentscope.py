"""The calculator agent with AgentScope: chat completions or responses."""

from __future__ import annotations

import os

from agentscope.agent import Agent
from agentscope.credential import OpenAICredential
from agentscope.message import UserMsg
from agentscope.model import OpenAIChatModel, OpenAIResponseModel
from agentscope.permission import PermissionBehavior, PermissionDecision
from agentscope.tool import FunctionTool, Toolkit
from shared import SYSTEM_PROMPT, Options, calculator, main

MODELS = {"chat": OpenAIChatModel, "responses": OpenAIResponseModel}


async def agent(options: Options) -> list[str]:
    credential = OpenAICredential(
        api_key=os.environ["OPENAI_API_KEY"], base_url=os.environ["OPENAI_BASE_URL"]
    )
    model = MODELS[options.api](credential=credential, model=options.model, stream=options.stream)
    allowed = PermissionDecision(behavior=PermissionBehavior.ALLOW, message="harmless")
    tools = Toolkit(tools=[FunctionTool(calculator, permission=allowed)])
    helper = Agent("helper", SYSTEM_PROMPT, model, toolkit=tools)
    answers = []
    for question in options.questions:
        answer = await helper.reply(UserMsg(name="user", content=question))
        answers.append(answer.get_text_content())
    return answers


if __name__ == "__main__":
    main(agent, "chat", "responses")
