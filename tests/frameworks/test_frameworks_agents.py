"""Agents of other frameworks, unmodified, through the real gateway over a real vLLM: every API that each speaks, whole and streamed.

Each cell is one conversation of two questions, each answered by a call of a tool and then in words: four calls of the model. The
second answer has words beside its call. What the model says is directed (gateway_process.py), how it is cut into tokens is sampled.
The same cells as a table: README, "Agents that run unmodified".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from agent_programs import HERE, Gateway, Told, environment_of

QUESTIONS = ("What is 47 plus 385?", "What is 12 plus 30? Think first.")
PLAIN = ("What is 47 plus 385?", "What is 12 plus 30?")
ANSWERS = ["The answer is 432.", "The answer is 42."]
DIALECTS = {
    "chat": "openai.chat",
    "responses": "openai.responses",
    "messages": "anthropic.messages",
}


@dataclass(frozen=True)
class Framework:
    """program: in examples/agents. metadata: of the rollout. venv: where the framework is installed."""

    program: str
    apis: tuple[str, ...]
    metadata: dict[str, Any] = field(default_factory=dict)
    venv: str = ".venv-frameworks"

    @property
    def name(self) -> str:
        return self.program.removeprefix("with_").removesuffix(".py")


GROWING = [
    Framework("with_openai.py", ("chat", "responses")),
    Framework("with_langgraph.py", ("chat", "responses")),
    Framework("with_openai_agents.py", ("responses", "chat")),
    Framework("with_autogen.py", ("chat",)),
    Framework("with_agent_framework.py", ("responses", "chat")),
    Framework("with_agentscope.py", ("chat", "responses")),
    Framework("with_pydantic_ai.py", ("chat", "responses", "messages")),
    Framework("with_anthropic.py", ("messages",)),
    Framework("with_claude_agent_sdk.py", ("messages",)),
]
"""Frameworks whose conversations only grow."""
SMOLAGENTS = Framework("with_smolagents.py", ("chat",), {"allow_constrained": True})
CREWAI = Framework("with_crewai.py", ("chat", "responses"), venv=".venv-crewai")


def cells(*frameworks: Framework) -> list[Any]:
    """(framework, api, whole or stream) of all that there is."""
    return [
        pytest.param(one, api, kind, id=f"{one.name}-{api}-{kind}")
        for one in frameworks
        for api in one.apis
        for kind in ("whole", "stream")
    ]


def run(
    gateway: Gateway, one: Framework, api: str, kind: str, questions: tuple[str, ...] = QUESTIONS
) -> Told:
    arguments = ["--api", api, *(["--stream"] if kind == "stream" else []), *questions]
    told = gateway.run(environment_of(one.venv), one.program, *arguments, **one.metadata)
    assert told.answers == ANSWERS
    assert told.dialects == {DIALECTS[api]}
    assert told.state["calls"] == len(told.calls) == 4
    assert told.state["engine_errors"] == told.state["disconnects"] == 0
    return told


def never_retokenized(told: Told) -> None:
    """Every call but the first goes on behind the exact ids of the one before."""
    assert told.state["retokenized_tokens"] == 0, told.branches
    assert told.branches == [None] * 4
    before = [None, *(call["span_id"] for call in told.calls)]
    assert [call["parent_call"] for call in told.calls] == before[:-1]


@pytest.mark.parametrize(("framework", "api", "kind"), cells(*GROWING))
def test_a_conversation_keeps_its_ids(
    gateway: Gateway, framework: Framework, api: str, kind: str
) -> None:
    never_retokenized(run(gateway, framework, api, kind))


@pytest.mark.parametrize(("framework", "api", "kind"), cells(SMOLAGENTS))
def test_smolagents_retells_the_models_turns_in_its_own_words(
    gateway: Gateway, framework: Framework, api: str, kind: str
) -> None:
    """It writes a call of a tool back as text ("Calling tools: [...]"): every later call is a branch, and is counted as one. It
    forces a call in every step, which a training rollout must allow."""
    told = run(gateway, framework, api, kind)
    assert told.branches == [None, *["echo_differs"] * 3]
    assert told.state["branches"] == 3
    assert told.state["retokenized_tokens"] > 0
    assert [call["attributes"]["agl.constrained"] for call in told.calls] == ["tool"] * 4


@pytest.mark.parametrize(
    ("framework", "api", "kind"),
    # Its streamed responses lose the calls of tools (crewai 1.15.30, _ahandle_streaming_responses), so there is no such cell.
    [cell for cell in cells(CREWAI) if cell.id != "crewai-responses-stream"],
)
def test_crewai_keeps_its_ids(gateway: Gateway, framework: Framework, api: str, kind: str) -> None:
    never_retokenized(run(gateway, framework, api, kind, PLAIN))


def test_crewai_drops_the_words_beside_a_call(gateway: Gateway) -> None:
    told = run(gateway, CREWAI, "chat", "whole")
    assert told.branches == [None, None, None, "echo_differs"]


def test_the_models_tokens_are_hardly_ever_the_tokenizers_own(gateway: Gateway) -> None:
    """Else the cells above would prove nothing."""
    told = run(gateway, GROWING[0], "chat", "whole")
    assert [call["own_tokens"] for call in told.calls] == [False] * 4


def test_anthropics_tool_runner_goes_on_without_threads(gateway: Gateway) -> None:
    """It first asks to keep the conversation (`thread`); told that there is no such thing, it sends the whole of it."""
    program = str(HERE / "anthropic_tool_runner.py")
    told = gateway.run(environment_of(".venv-frameworks"), program, *QUESTIONS)
    assert told.answers == ANSWERS
    assert told.state["retokenized_tokens"] == 0
    assert told.branches == [None, None, "new_conversation", None]
