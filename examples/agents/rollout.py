"""How reinforcement learning meets an agent of any framework: one function that starts its program and looks at its answer.

`agent: examples/agents/rollout.py:calculator` in a run's configuration names it. A row of the task says which program of this
folder is to answer: {"agent": "with_langgraph.py", "question": "What is 47 plus 385?", "answer": 432}. The program runs under the
Python of `PYTHON` (an environment with its framework), and knows of us by the addresses in its environment alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import agl_ray as agl

HERE = Path(__file__).resolve().parent
PYTHON = os.environ.get("AGENTS_PYTHON", sys.executable)


@agl.rollout
async def calculator(task: dict[str, Any], llm: agl.LLM) -> float:
    """1.0 if the program's answer ends with the right number, else 0.0."""
    command = [PYTHON, str(HERE / task["agent"]), "--model", llm.model, task["question"]]
    for_openai = {"OPENAI_BASE_URL": llm.endpoint, "OPENAI_API_KEY": llm.api_key}
    for_anthropic = {"ANTHROPIC_BASE_URL": llm.endpoint, "ANTHROPIC_API_KEY": llm.api_key}
    said = await output_of(command, {**os.environ, **for_openai, **for_anthropic})
    answers = json.loads([line for line in said.splitlines() if line.startswith('["')][-1])
    return float(answers[-1].rstrip(".").endswith(str(task["answer"])))


async def output_of(command: list[str], environment: Any) -> str:
    """What a program prints. It is stopped with the rollout; RuntimeError with its last words where it fails."""
    pipe = asyncio.subprocess.PIPE
    program = await asyncio.create_subprocess_exec(
        *command, env=environment, stdout=pipe, stderr=pipe
    )
    try:
        said, complaint = await program.communicate()
    finally:
        if program.returncode is None:
            program.kill()
    if program.returncode:
        raise RuntimeError(f"{command[1]} failed: {complaint.decode(errors='replace')[-2000:]}")
    return said.decode()
