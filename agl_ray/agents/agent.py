"""What a user writes: a function under `@rollout`, or a subclass of `LitAgent`.

The runner calls `run_agent` (agl_ray.agents.execute) with one of these. Nothing here knows about Ray.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from agl_ray.types import LLM, InputError, NamedResources, PromptTemplate, Record, Rollout

INJECTED = ("llm", "prompt_template", "resources", "rollout", "ctx")


class EnvironmentFailure(Exception):
    """Raise this in an agent when its environment failed (a tool, a sandbox, a site), not the agent: the attempt ends
    `env_error`, is tried again within `max_attempts`, and never becomes a reward."""


class RolloutContext(Record, frozen=True):
    """What an agent may know about the rollout it is in; ask for it with a parameter named `ctx`."""

    rollout_id: str
    attempt_id: str
    mode: str | None = None
    step: int | None = None
    group_index: int | None = None
    attempt_number: int = 1
    timeout_seconds: float | None = None


class LitAgent:
    """An agent as a class. Override `rollout` (plain) or `rollout_async` (a coroutine).

    `training_rollout*` and `validation_rollout*`, where defined, are used for mode train, and for every other mode. A
    fresh shallow copy of the object serves each rollout, so attributes set on `self` do not leak into another one.
    """

    def rollout(self, task: Any, resources: NamedResources, rollout: Rollout) -> float | None:
        """Run the agent on `task`; return the reward, or None when it was emitted."""
        raise InputError(
            f"{type(self).__name__}: expected one of rollout, rollout_async, training_rollout... to be defined, got none"
        )

    def method_for(self, mode: str | None) -> Callable[..., Any]:
        """The bound method that serves `mode`."""
        prefix = "training_" if mode == "train" else "validation_"
        for name in (f"{prefix}rollout_async", f"{prefix}rollout", "rollout_async"):
            method = getattr(self, name, None)
            if method is not None:
                return method  # type: ignore[no-any-return]
        return self.rollout


class FunctionAgent(LitAgent):
    """A function made into an agent by `@rollout`; calling it calls the function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.parameters = _check_parameters(function)
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return (FunctionAgent, (self.function,))

    def arguments(
        self, task: Any, resources: NamedResources, rollout: Rollout, ctx: RolloutContext
    ) -> dict[str, Any]:
        """Keyword arguments for the function: the task under its first parameter, the rest by name."""
        values: dict[str, Callable[[], Any]] = {
            "llm": lambda: _only(resources, LLM, "llm"),
            "prompt_template": lambda: _only(resources, PromptTemplate, "prompt_template"),
            "resources": lambda: resources,
            "rollout": lambda: rollout,
            "ctx": lambda: ctx,
        }
        first, *others = self.parameters
        return {first: task, **{name: values[name]() for name in others}}


def rollout(function: Callable[..., Any]) -> FunctionAgent:
    """Make a function (plain or async) an agent: its first parameter is the task; `llm`, `prompt_template`, `resources`,
    `rollout` and `ctx` are injected by name. It returns the reward, or None when `emit_reward` was called.

    InputError for a parameter that nothing can be injected for.
    """
    return FunctionAgent(function)


def as_agent(thing: Any, what: str = "agent") -> LitAgent:
    """`thing` as an agent: a LitAgent, a subclass of it, or a plain function; InputError for anything else."""
    if isinstance(thing, LitAgent):
        return thing
    if inspect.isclass(thing) and issubclass(thing, LitAgent):
        return thing()
    if inspect.isfunction(thing):
        return FunctionAgent(thing)
    raise InputError(
        f"{what}: expected a function (with @agl.rollout or without) or a LitAgent, got {type(thing).__name__}"
    )


def _check_parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    parameters = list(inspect.signature(function).parameters.values())
    name = getattr(function, "__name__", str(function))
    if not parameters:
        raise InputError(f"agent {name}: expected a first parameter for the task, got none")
    for parameter in parameters[1:]:
        optional = parameter.default is not parameter.empty
        if parameter.name not in INJECTED and not optional:
            raise InputError(
                f"agent {name}: nothing can be injected for its parameter {parameter.name!r}; "
                f"expected one of {', '.join(INJECTED)}, or a default value"
            )
    return (parameters[0].name, *(p.name for p in parameters[1:] if p.name in INJECTED))


def _only(resources: NamedResources, kind: type, parameter: str) -> Any:
    found = [resource for resource in resources.values() if isinstance(resource, kind)]
    if not found:
        raise InputError(
            f"agent parameter {parameter!r}: no {kind.__name__} among the resources {sorted(resources)}"
        )
    return found[0]
