"""A user's function as a judge: plain (in a thread) or async, its parameters by name.

Who calls it: the judge actor. Test alone: tests/unit/test_judge_bench.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from agl_ray.agents.calling import call
from agl_ray.judge.bench import Ask, AskAgain
from agl_ray.judge.case import Case, Verdict
from agl_ray.types import InputError

PARAMETERS: dict[str, Callable[[Case], Any]] = {
    "task": lambda case: case.task,
    "messages": lambda case: case.messages,
    "calls": lambda case: case.calls,
    "reward": lambda case: case.reward,
    "mode": lambda case: case.mode,
    "case": lambda case: case,
}


def asking_function(function: Any, what: str) -> Ask:
    """Ask `function`; InputError where it is none or wants what nothing can be given for. `what`: its name in the configuration."""
    if not callable(function):
        raise InputError(f"judge.function: {what}: expected a function, got {function!r}")
    names = _names(function, what)

    async def ask(case: Case) -> Verdict:
        arguments = {name: PARAMETERS[name](case) for name in names}
        try:
            said = await call(function, arguments, apart=True)
            return said if isinstance(said, Verdict) else Verdict(reward=_number(said))
        except Exception as error:
            raise AskAgain(f"{what}: {type(error).__name__}: {error}") from error

    return ask


def _names(function: Callable[..., Any], what: str) -> list[str]:
    names = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in PARAMETERS:
            names.append(parameter.name)
        elif parameter.default is parameter.empty:
            raise InputError(
                f"judge.function: {what}: nothing can be given for its parameter {parameter.name!r}; expected some of "
                f"{', '.join(PARAMETERS)}, or a default value"
            )
    return names


def _number(said: Any) -> float:
    if isinstance(said, bool | int | float):
        return float(said)  # Verdict refuses what is not finite
    if hasattr(said, "item") and getattr(said, "size", 2) == 1:  # a NumPy scalar
        return _number(said.item())
    raise InputError(f"expected a finite number or a Verdict, got {said!r:.200}")
