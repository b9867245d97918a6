"""What a user writes: a function under `@rollout`, or a subclass of `LitAgent`.

The runner calls `run_agent` (agl_ray.agents.execute) with one of these. Nothing here knows about Ray.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import tempfile
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from agl_ray.agents.injection import TASK, injected
from agl_ray.types import (
    LLM,
    AttemptedRollout,
    InputError,
    NamedResources,
    PromptTemplate,
    Record,
    Rollout,
)

T = TypeVar("T")
log = logging.getLogger("agl_ray.agent")


class EnvironmentFailure(Exception):
    """Raise this in an agent when its environment failed (a tool, a sandbox, a site), not the agent: the attempt ends
    `env_error`, is tried again within `max_attempts`, and never becomes a reward."""


class RolloutContext(Record, frozen=True):
    """What an agent may know about the rollout it is in; ask for it with a parameter named `ctx`.

    step: the training step it is for. group_index: its place among the rollouts of one row. weight_version: the newest weights when it was
    queued (each token's own version is with the call). timeout_seconds: its deadline. store_url: root of the store's HTTP doors,
    where `store.door` opens them. artifacts_folder: see `artifacts`.
    """

    rollout_id: str
    attempt_id: str
    mode: str | None = None
    step: int | None = None
    group_index: int | None = None
    attempt_number: int = 1
    timeout_seconds: float | None = None
    llms: dict[str, LLM] = {}
    """Role -> its endpoint; under the empty name the run's own."""
    weight_version: int | None = None
    store_url: str | None = None
    artifacts_folder: str | None = None

    @property
    def artifacts(self) -> Path:
        """A folder of this attempt's own for whatever the agent wants to keep, made when first asked for: in a run,
        `artifacts/ROLLOUT/ATTEMPT` in the run folder (on the runner's node)."""
        root = self.artifacts_folder or str(Path(tempfile.gettempdir()) / "agl_ray_artifacts")
        folder = Path(root) / self.rollout_id / self.attempt_id
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def logger(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger whose lines begin with the rollout's and the attempt's id."""
        return _Named(log, {"name": f"{self.rollout_id}/{self.attempt_id}"})

    def llm(self, role: str | None = None) -> LLM:
        """The endpoint of a role of the config section `roles`, or the run's own: `endpoint` is the base URL for a client, `model` the name to
        ask for. InputError lists the roles where there is no such one."""
        if (role or "") not in self.llms:
            known = ", ".join(sorted(name for name in self.llms if name)) or "none in this run"
            raise InputError(
                f"ctx.llm({role!r}): unknown role; expected one of the config's roles ({known}), or nothing for the run's own engine"
            )
        return self.llms[role or ""]


class _Named(logging.LoggerAdapter[logging.Logger]):
    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        return f"{(self.extra or {})['name']}: {msg}", kwargs


class LitAgent(Generic[T]):
    """An agent as a class. Override `rollout` (plain) or `rollout_async` (a coroutine); `training_rollout*` and `validation_rollout*`,
    where overridden, serve mode train, and every other mode. Each takes task, resources and rollout, and `ctx` where it names it.

    Every rollout gets an object of its own, a deep copy of this one, so that nothing set on `self` reaches another rollout; an agent
    that keeps nothing says `stateless = True` and is shared. What a module or a class holds is shared in any case, except with
    `runners.isolation: process`.
    """

    stateless: bool = False

    def rollout(self, task: T, resources: NamedResources, rollout: Rollout) -> Any:
        """Run the agent on `task`; return the reward, None when it was emitted or posted, or a list of spans to record with the attempt
        (`agl_ray.agents.returned_spans`), whose last reward counts."""
        raise InputError(
            f"{type(self).__name__}: expected one of rollout, rollout_async, training_rollout... to be defined, got none"
        )

    async def rollout_async(self, task: T, resources: NamedResources, rollout: Rollout) -> Any:
        """As `rollout`, as a coroutine."""
        return self.rollout(task, resources, rollout)

    def training_rollout(self, task: T, resources: NamedResources, rollout: Rollout) -> Any:
        """As `rollout`, in mode train."""
        return self.rollout(task, resources, rollout)

    async def training_rollout_async(
        self, task: T, resources: NamedResources, rollout: Rollout
    ) -> Any:
        """As `training_rollout`, as a coroutine."""
        return await self.rollout_async(task, resources, rollout)

    def validation_rollout(self, task: T, resources: NamedResources, rollout: Rollout) -> Any:
        """As `rollout`, in every mode but train."""
        return self.rollout(task, resources, rollout)

    async def validation_rollout_async(
        self, task: T, resources: NamedResources, rollout: Rollout
    ) -> Any:
        """As `validation_rollout`, as a coroutine."""
        return await self.rollout_async(task, resources, rollout)

    def on_rollout_start(self, task: AttemptedRollout, runner: Any, tracer: Any) -> Any:
        """Called before each rollout, on the object that runs it; may be a coroutine. See `agl_ray.agents.Hook`."""

    def on_rollout_end(
        self, task: AttemptedRollout, rollout: AttemptedRollout, runner: Any, tracer: Any
    ) -> Any:
        """Called after each rollout, on the object that ran it; may be a coroutine."""

    def fresh(self) -> Self:
        """The object for one rollout. InputError where no deep copy can be made."""
        if self.stateless:
            return self
        try:
            return copy.deepcopy(self)
        except Exception as error:
            raise InputError(
                f"agent {type(self).__name__}: every rollout gets a copy of its own and this object cannot be copied "
                f"({type(error).__name__}: {error}); set stateless = True in its class where it keeps nothing between rollouts, "
                "override fresh(self), or make the part that cannot be copied inside the rollout"
            ) from error

    def method_for(self, mode: str | None) -> Callable[..., Any]:
        """The bound method that serves `mode`: of those that the class overrides the most special one, coroutines first."""
        prefix = "training_" if mode == "train" else "validation_"
        for name in (f"{prefix}rollout_async", f"{prefix}rollout", "rollout_async"):
            if getattr(type(self), name) is not getattr(LitAgent, name):
                return getattr(self, name)  # type: ignore[no-any-return]
        return self.rollout

    def bound(
        self, attempt: AttemptedRollout, resources: NamedResources, ctx: RolloutContext
    ) -> tuple[Callable[..., Any], dict[str, Any]]:
        """The function that runs this attempt, and its arguments by name."""
        # As in agent-lightning: what the agent gets as its rollout knows its attempt, too.
        method = self.method_for(attempt.rollout.mode)
        values = {"task": attempt.rollout.input, "resources": resources, "rollout": attempt}
        if "ctx" in inspect.signature(method).parameters:
            values["ctx"] = ctx
        return method, values


class FunctionAgent(LitAgent[Any]):
    """A function made into an agent by `@rollout`; calling it calls the function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.parameters = injected(function, RolloutContext)
        given = inspect.signature(function).parameters.values()
        self.defaults = {one.name: one.default for one in given if one.default is not one.empty}
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return (FunctionAgent, (self.function,))

    def fresh(self) -> Self:
        """Itself: a function keeps nothing."""
        return self

    def bound(
        self, attempt: AttemptedRollout, resources: NamedResources, ctx: RolloutContext
    ) -> tuple[Callable[..., Any], dict[str, Any]]:
        """The function, and what each of its parameters gets."""
        values: dict[str, Callable[[str], Any]] = {
            TASK: lambda name: attempt.rollout.input,
            "llm": lambda name: ctx.llms.get("") or self._first(resources, LLM, name),
            "prompt_template": lambda name: self._first(resources, PromptTemplate, name),
            "resources": lambda name: resources,
            "rollout": lambda name: attempt,
            "ctx": lambda name: ctx,
        }
        return self.function, {name: values[what](name) for name, what in self.parameters.items()}

    def _first(self, resources: NamedResources, kind: type, parameter: str) -> Any:
        """The first resource of this kind, else the parameter's default. InputError where it has none."""
        found = [resource for resource in resources.values() if isinstance(resource, kind)]
        if not found and parameter not in self.defaults:
            raise InputError(
                f"agent parameter {parameter!r}: no {kind.__name__} among the resources {sorted(resources)}"
            )
        return found[0] if found else self.defaults[parameter]


def rollout(function: Callable[..., Any]) -> FunctionAgent:
    """Make a function (plain or async) an agent: `llm`, `prompt_template`, `resources`, `rollout` and `ctx` are injected by
    name, and under any other name by type (`model: LLM`); the task is the parameter `task`, else the first one left. It returns the reward,
    or None when `emit_reward` was called.

    InputError for a parameter that nothing can be injected for, and for one whose name and type contradict each other.
    """
    return FunctionAgent(function)


def llm_rollout(function: Callable[..., Any]) -> FunctionAgent:
    """`rollout`, for a function with a parameter `llm`, or of type LLM (the name that agent-lightning 0.3 gives to it). InputError without one."""
    return _with_parameter(function, "llm")


def prompt_rollout(function: Callable[..., Any]) -> FunctionAgent:
    """`rollout`, for a function with a parameter `prompt_template`, or of type PromptTemplate. InputError without one."""
    return _with_parameter(function, "prompt_template")


def _with_parameter(function: Callable[..., Any], name: str) -> FunctionAgent:
    agent = FunctionAgent(function)
    if name not in agent.parameters.values():
        text = f"expected a parameter {name!r} after the task, got {list(agent.parameters)}"
        raise InputError(f"agent {getattr(function, '__name__', function)}: {text}")
    return agent


def as_agent(thing: Any, what: str = "agent") -> LitAgent:
    """`thing` as an agent: a LitAgent, a subclass of it, or a plain function. InputError for anything else, and for an object that
    cannot be copied for each rollout."""
    if inspect.isclass(thing) and issubclass(thing, LitAgent):
        thing = thing()
    if inspect.isfunction(thing):
        return FunctionAgent(thing)
    if not isinstance(thing, LitAgent):
        raise InputError(
            f"{what}: expected a function (with @agl.rollout or without) or a LitAgent, got {type(thing).__name__}"
        )
    thing.fresh()
    return thing
