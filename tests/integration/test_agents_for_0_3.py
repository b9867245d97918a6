"""Agents written for agentlightning 0.3 run with only their import changed."""

from __future__ import annotations

import asyncio
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

SOURCE = Path(__file__).with_name("agents_for_0_3.py")
TASK = {"question": "What is 47 plus 385?", "answer": "432"}
RIGHT = Outcome(reason=EndReason.OK, reward=1.0)


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(save_model_folder(tmp_path_factory.mktemp("model")), "hermes")


@pytest.fixture(scope="module")
def agents() -> dict[str, Any]:
    text = SOURCE.read_text()
    assert text.count("agentlightning as agl") == 1
    found: dict[str, Any] = {"__name__": "agents_for_0_3"}
    code = text.replace("import agentlightning as agl", "import agl_ray as agl")
    exec(compile(code, str(SOURCE), "exec"), found)
    return found


def run(desk: Desk, agent: Any) -> Outcome:
    attempt = AttemptedRollout(
        rollout=replace(desk.store.rollout, input=TASK), attempt=desk.store.attempt
    )

    async def main() -> Outcome:
        async with serving(desk.app) as url:
            resources = {"main_llm": agl.LLM(endpoint=url, model="tiny")}
            recorder = SpanRecorder("ro-1", "at-1")
            return await run_agent(as_agent(agent), attempt, resources, recorder, 60.0)

    return asyncio.run(main())


def told(renderer: Renderer, *texts: str, mode: str = "train") -> Desk:
    return Desk(renderer, [says(renderer, text) for text in texts], mode=mode)


def test_a_function_with_a_tool_and_an_emitted_reward(
    renderer: Renderer, agents: dict[str, Any]
) -> None:
    desk = told(renderer, calls("47+385"), "The answer is 432.")
    assert run(desk, agents["calculator"]) == RIGHT
    assert [row["attributes"]["agl.retokenized_tokens"] for row in desk.rows] == [0, 0]


@pytest.mark.parametrize(("mode", "num_calls"), [("train", 2), ("val", 1)])
def test_a_class_that_trains_and_validates_in_its_own_ways(
    renderer: Renderer, agents: dict[str, Any], mode: str, num_calls: int
) -> None:
    desk = told(renderer, *["It is 432."] * num_calls, mode=mode)
    assert run(desk, agents["Checker"]()) == RIGHT
    assert len(desk.rows) == num_calls
