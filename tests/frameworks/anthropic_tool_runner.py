"""An agent of tests/frameworks: `tool_runner` of Anthropic's client, which calls the tools by itself."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "agents"))

from anthropic import AsyncAnthropic, beta_async_tool
from shared import SYSTEM_PROMPT, Options, main
from shared import calculator as evaluate


@beta_async_tool
async def calculator(expression: str) -> str:
    """Evaluate one operation of two whole numbers.

    Args:
        expression: such as 12*7
    """
    return evaluate(expression)


async def agent(options: Options) -> list[str]:
    client, answers = AsyncAnthropic(), []
    for question in options.questions:
        runner = client.beta.messages.tool_runner(
            model=options.model,
            max_tokens=1000,
            system=SYSTEM_PROMPT,
            tools=[calculator],
            messages=[{"role": "user", "content": question}],
        )
        answers.append((await runner.until_done()).content[-1].text)
    return answers


if __name__ == "__main__":
    main(agent, "messages")
