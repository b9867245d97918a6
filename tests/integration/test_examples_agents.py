"""An example agent as a user starts it: a function under @agl.rollout starts its program, which knows an address and nothing else."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from asgi_serving import serving
from gateway_desk import Desk, calls, says
from gateway_fakes import save_model_folder

import agl_ray as agl
from agl_ray.agents import Outcome, as_agent, run_agent
from agl_ray.gateway.render import Renderer
from agl_ray.tracing import SpanRecorder
from agl_ray.types import AttemptedRollout, EndReason, replace

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "agents" / "rollout.py"
TASK = {"agent": "with_openai.py", "question": "What is 47 plus 385?", "answer": 432}


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(save_model_folder(tmp_path_factory.mktemp("model")), "hermes")


def run(desk: Desk, task: dict[str, Any], seconds: float = 60.0) -> Outcome:
    spec = importlib.util.spec_from_file_location("examples_agents_rollout", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    attempt = AttemptedRollout(
        rollout=replace(desk.store.rollout, input=task), attempt=desk.store.attempt
    )

    async def main() -> Outcome:
        async with serving(desk.app) as url:
            resources = {"main_llm": agl.LLM(endpoint=url, model="tiny")}
            recorder = SpanRecorder("ro-1", "at-1")
            return await run_agent(
                as_agent(module.calculator), attempt, resources, recorder, seconds
            )

    return asyncio.run(main())


def test_a_program_of_its_own_is_an_agent(renderer: Renderer) -> None:
    script = [calls("47+385"), "The answer is 432."]
    desk = Desk(renderer, [says(renderer, text) for text in script], mode="train")
    assert run(desk, TASK) == Outcome(reason=EndReason.OK, reward=1.0)
    assert [row["attributes"]["agl.retokenized_tokens"] for row in desk.rows] == [0, 0]
    assert "47+385=432" in desk.prompt()


def test_a_program_that_fails_is_the_agents_error(renderer: Renderer) -> None:
    outcome = run(Desk(renderer, [], mode="train"), {**TASK, "agent": "with_nothing.py"})
    assert outcome.reason is EndReason.AGENT_ERROR
    assert "with_nothing.py failed" in (outcome.error or "")
