"""`ctx.llm(role)`: an endpoint under the attempt's own URL for every role of the resource."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

import agl_ray as agl
from agl_ray.agents.execute import Place, run_agent
from agl_ray.agents.roles import endpoints
from agl_ray.tracing import SpanRecorder
from agl_ray.types import Attempt, AttemptedRollout, EndReason, InputError, NamedResources, Rollout

ROOT = "http://gw/rollout/ro-1/attempt/at-1"
LLM = agl.LLM(
    endpoint="http://gw",
    model="main",
    sampling_parameters={"temperature": 0.5},
    roles={"planner": None, "judge": "far"},
)


def attempt(**metadata: Any) -> AttemptedRollout:
    return AttemptedRollout(
        rollout=Rollout(rollout_id="ro-1", input=1, start_time=0.0, metadata=metadata),
        attempt=Attempt(rollout_id="ro-1", attempt_id="at-1", sequence_id=1, start_time=0.0),
    )


def test_every_role_has_its_url_and_model() -> None:
    found = endpoints(attempt(), {"main_llm": LLM})
    assert {name: (llm.endpoint, llm.model) for name, llm in found.items()} == {
        "": (f"{ROOT}/v1", "main"),
        "planner": (f"{ROOT}/role/planner/v1", "main"),
        "judge": (f"{ROOT}/role/judge/v1", "far"),
    }
    assert found["planner"].sampling_parameters == {"temperature": 0.5}
    assert found["judge"].sampling_parameters == {}
    assert found["judge"].get_base_url("ro-1", "at-1") == f"{ROOT}/role/judge/v1"
    assert endpoints(attempt(), {}) == {}
    other = agl.LLM(endpoint="http://other", model="b")
    both = {"a": other, "main_llm": LLM}
    assert endpoints(attempt(resource="main_llm"), both)["judge"].model == "far"
    assert set(endpoints(attempt(), both)) == {""}


def test_an_agent_gets_at_them() -> None:
    seen = {}

    @agl.rollout
    async def agent(task: int, ctx: agl.RolloutContext) -> float:
        seen["planner"] = ctx.llm("planner").endpoint
        seen["own"] = ctx.llm().endpoint
        ctx.llm("plannner")
        return 1.0

    recorder = SpanRecorder("ro-1", "at-1")
    outcome = asyncio.run(run_agent(agent, attempt(), {"main_llm": LLM}, recorder, 5.0))
    assert seen == {"planner": f"{ROOT}/role/planner/v1", "own": f"{ROOT}/v1"}
    assert outcome.reason is EndReason.AGENT_ERROR
    assert "unknown role" in (outcome.error or "")
    assert "judge, planner" in (outcome.error or "")


def test_a_run_without_roles_says_so() -> None:
    with pytest.raises(InputError, match="none in this run"):
        agl.RolloutContext(rollout_id="r", attempt_id="a").llm("planner")


def test_everybody_gets_the_llm_that_the_metadata_names() -> None:
    seen = {}

    @agl.rollout
    def agent(task: int, llm: agl.LLM, ctx: agl.RolloutContext) -> float:
        seen["injected"], seen["asked for"] = llm.model, ctx.llm().model
        return 1.0

    outside = agl.LLM(endpoint="http://far/v1", model="far", gateway=False)
    resources: NamedResources = {"a": agl.LLM(endpoint="http://gw", model="A"), "b": LLM}
    resources["c"] = outside
    script = """echo "{\\"reward\\": \\"$AGL_MODEL $OPENAI_BASE_URL\\"}" """
    program = agl.CommandAgent(["sh", "-c", script])
    for name, expected, url in [
        ("a", "A", f"{ROOT}/v1"),
        ("b", "main", f"{ROOT}/v1"),
        ("c", "far", "http://far/v1"),
        (None, "A", f"{ROOT}/v1"),
    ]:
        given = attempt(resource=name) if name else attempt()
        recorder = SpanRecorder("ro-1", "at-1")
        asyncio.run(run_agent(agent, given, resources, recorder, 5.0))
        assert seen == {"injected": expected, "asked for": expected}
        outcome = asyncio.run(run_agent(program, given, resources, recorder, 20.0))
        assert f"{expected} {url}" in str(outcome.error)  # as a reward it is none


@pytest.mark.parametrize("named", ["main", "", 7, ["main_llm"], "prompt"])
def test_a_resource_that_is_no_llm_of_the_rollout_is_refused(named: Any) -> None:
    template = agl.PromptTemplate(template="{x}", engine="f-string")
    resources: NamedResources = {"main_llm": LLM, "b": LLM, "prompt": template}
    refusal = (
        r"rollout ro-1: expected metadata\['resource'\] to name one of its LLM resources \(b, main_llm\), "
        rf"got {re.escape(repr(named))}; "
    )
    with pytest.raises(InputError, match=refusal):
        endpoints(attempt(resource=named), resources)
    with pytest.raises(InputError, match=r"\(there are none\), got"):
        endpoints(attempt(resource=named), {"prompt": template})
    assert endpoints(attempt(resource=None), resources)[""].model == "main"


@pytest.mark.parametrize("place", [*Place])
def test_an_attempt_with_a_resource_that_is_not_there_ends_before_its_agent_begins(
    place: Place,
) -> None:
    begun = []

    @agl.rollout
    def agent(task: int, llm: agl.LLM) -> float:
        begun.append(llm)
        return 1.0

    recorder = SpanRecorder("ro-1", "at-1")
    given = (agent, attempt(resource="mian"), {"main": LLM}, recorder, 60.0)
    outcome = asyncio.run(run_agent(*given, place=place))
    assert (outcome.reason, outcome.reward, begun) == (EndReason.AGENT_ERROR, None, [])
    assert "LLM resources (main), got 'mian'" in (outcome.error or "")
