"""What a function's parameters get: by name, else by type."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Optional

import pytest

import agl_ray as agl
from agl_ray.agents.agent import RolloutContext, llm_rollout, prompt_rollout
from agl_ray.agents.injection import injected
from agl_ray.types import Attempt, AttemptedRollout, InputError, NamedResources, Rollout

if TYPE_CHECKING:
    from elsewhere import Question  # type: ignore[import-not-found]


def by_name(task, llm, ctx):  # type: ignore[no-untyped-def]
    return None


def first_left(row: dict[str, Any], model: agl.LLM) -> None: ...
def task_last(llm: agl.LLM, task: dict[str, Any]) -> None: ...
def types_only(
    model: agl.LLM,
    row: Any,
    ask: agl.PromptTemplate,
    given: NamedResources,
    one: Rollout | AttemptedRollout,
    about: agl.RolloutContext,
) -> None: ...
def with_none(
    task: Any,
    a: agl.LLM | None = None,
    b: Optional[agl.LLM] = None,  # noqa: UP045
    c: Annotated[agl.PromptTemplate | None, "ours"] = None,
) -> None: ...
def own_option(model: agl.LLM, limit: int = 3, *, row: Any) -> None: ...
def only_a_default(row: Any = 1) -> None: ...
def unknown_to_us(task: Question, model: agl.LLM) -> None: ...
def two_kinds(task: Any, llm: agl.LLM | agl.PromptTemplate) -> None: ...


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (by_name, {"task": "task", "llm": "llm", "ctx": "ctx"}),
        (first_left, {"row": "task", "model": "llm"}),
        (task_last, {"llm": "llm", "task": "task"}),
        (
            types_only,
            {
                "model": "llm",
                "row": "task",
                "ask": "prompt_template",
                "given": "resources",
                "one": "rollout",
                "about": "ctx",
            },
        ),
        (with_none, {"task": "task", "a": "llm", "b": "llm", "c": "prompt_template"}),
        (own_option, {"model": "llm", "row": "task"}),
        (only_a_default, {"row": "task"}),
        (unknown_to_us, {"task": "task", "model": "llm"}),
        (two_kinds, {"task": "task", "llm": "llm"}),
    ],
)
def test_by_name_and_by_type(function: Callable[..., Any], expected: dict[str, str]) -> None:
    assert injected(function, RolloutContext) == expected


def contradicts(task: Any, llm: agl.PromptTemplate) -> None: ...
def task_is_a_model(task: agl.LLM) -> None: ...
def no_task(llm: agl.LLM, template: agl.PromptTemplate) -> None: ...
def database(task: Any, database: Any) -> None: ...
def nothing() -> None: ...


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (contradicts, "agent contradicts: the name of its parameter 'llm' and its type contradict"),
        (task_is_a_model, "'task' and its type contradict"),
        (no_task, "agent no_task: expected a parameter for the task"),
        (database, "nothing can be injected for its parameter 'database'"),
        (nothing, "expected a first parameter for the task, got none"),
    ],
)
def test_what_makes_no_sense_is_refused(function: Callable[..., Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        agl.rollout(function)


def test_the_values_arrive_and_the_agent_can_be_pickled() -> None:
    agent = pickle.loads(pickle.dumps(agl.rollout(types_only)))
    attempt = AttemptedRollout(
        rollout=Rollout(rollout_id="ro-1", input={"q": 1}, start_time=0.0),
        attempt=Attempt(rollout_id="ro-1", attempt_id="at-1", sequence_id=1, start_time=0.0),
    )
    llm, ask = agl.LLM(endpoint="http://e", model="m"), agl.PromptTemplate(template="{q}")
    resources: NamedResources = {"main_llm": llm, "ask": ask}
    ctx = RolloutContext(rollout_id="ro-1", attempt_id="at-1")
    assert agent.bound(attempt, resources, ctx)[1] == {
        "model": llm,
        "row": {"q": 1},
        "ask": ask,
        "given": resources,
        "one": attempt,
        "about": ctx,
    }
    assert agl.rollout(with_none).bound(attempt, {"main_llm": llm}, ctx)[1] == {
        "task": {"q": 1},
        "a": llm,
        "b": llm,
        "c": None,  # there is none: its default
    }
    with pytest.raises(InputError, match="'ask': no PromptTemplate among the resources"):
        agent.bound(attempt, {"main_llm": llm}, ctx)


def test_the_two_of_0_3_take_the_type_too() -> None:
    assert llm_rollout(first_left).parameters["model"] == "llm"
    with pytest.raises(InputError, match="expected a parameter 'prompt_template'"):
        prompt_rollout(first_left)
