"""How reinforcement learning meets the calculator agent: one function that runs it and says how well it did.

`agent: examples/quickstart/rollout.py:calculator` in configs/quickstart.yaml names this function; the runner calls it for
every row of the task (task.py) with the endpoint at which the model being trained answers.
"""

from __future__ import annotations

from typing import Any

from agent import ask
from task import is_right

import agl_ray as agl


@agl.rollout
async def calculator(task: dict[str, Any], llm: agl.LLM) -> float:
    """1.0 if the last integer of the agent's answer is right, else 0.0."""
    answer = await ask(
        task["question"], model=llm.model, base_url=llm.endpoint, api_key=llm.api_key or "none"
    )
    return float(is_right(answer, task["answer"]))
