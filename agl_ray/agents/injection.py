"""Which parameter of an agent's function gets what: by its name, else by its type.

Called by agent.py, when a function is made an agent. Test alone: tests/unit/test_agents_injection.py.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any, Union, get_args, get_origin, get_type_hints

from agl_ray.types import LLM, AttemptedRollout, InputError, NamedResources, PromptTemplate, Rollout

TASK = "task"
INJECTED = ("llm", "prompt_template", "resources", "rollout", "ctx")


def injected(function: Callable[..., Any], context: type) -> dict[str, str]:
    """Parameter -> what it gets, one of INJECTED or TASK; those that keep their default are left out. context: type of `ctx`.

    The task's is the parameter of that name, else the first one that gets nothing else. InputError names a parameter whose name and type say
    different things, one that nothing can be injected for, and a function without a place for the task.
    """
    agent = f"agent {getattr(function, '__name__', function)}"
    parameters = inspect.signature(function).parameters
    if not parameters:
        raise InputError(f"{agent}: expected a first parameter for the task, got none")
    first = next(iter(parameters))
    found = {}
    for name, parameter in parameters.items():
        by_type = _by_type(function, parameter, context)
        if (what := _what(agent, name, by_type)) is not None:
            found[name] = what
    if TASK not in found.values():
        # A default value says that the parameter is an option of the function's own, but for the first.
        left = [
            name
            for name, parameter in parameters.items()
            if name not in found and (parameter.default is parameter.empty or name == first)
        ]
        if not left:
            raise InputError(
                f"{agent}: expected a parameter for the task, got {list(parameters)}, which all get something else"
            )
        found[left[0]] = TASK
    _check_others(agent, [one for name, one in parameters.items() if name not in found])
    return found


def _what(agent: str, name: str, by_type: str | None) -> str | None:
    """What the parameter gets; None where neither its name nor its type says it."""
    if name not in (*INJECTED, TASK) or name == by_type:
        return by_type
    if by_type is not None:
        raise InputError(
            f"{agent}: the name of its parameter {name!r} and its type contradict each other; "
            f"expected another name for what {by_type!r} gets, or another type"
        )
    return name


def _check_others(agent: str, parameters: list[inspect.Parameter]) -> None:
    for parameter in parameters:
        if parameter.default is parameter.empty:
            raise InputError(
                f"{agent}: nothing can be injected for its parameter {parameter.name!r}; "
                f"expected one of {', '.join(INJECTED)}, a type that says which, or a default value"
            )


def _by_type(
    function: Callable[..., Any], parameter: inspect.Parameter, context: type
) -> str | None:
    """What the parameter's type stands for, alone or with None; None where it stands for nothing, or cannot be known here."""
    if parameter.annotation is parameter.empty:
        return None
    holder = types.SimpleNamespace(__annotations__={"it": parameter.annotation})
    names = getattr(inspect.unwrap(function), "__globals__", {})
    try:
        hint = get_type_hints(holder, names)["it"]
    except Exception:  # noqa: BLE001  an annotation is any expression, and may name what only a type checker imports
        return None
    table: list[tuple[Any, str]] = [
        *((LLM, "llm"), (PromptTemplate, "prompt_template"), (NamedResources, "resources")),
        *((Rollout, "rollout"), (AttemptedRollout, "rollout"), (context, "ctx")),
    ]
    union = get_origin(hint) in (Union, types.UnionType)
    members = [one for one in get_args(hint) if one is not type(None)] if union else [hint]
    stands_for = {next((what for kind, what in table if kind == one), None) for one in members}
    return stands_for.pop() if len(stands_for) == 1 else None
