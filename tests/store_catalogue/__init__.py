"""The behaviour of the LightningStore as one set of scenarios, whatever journal it has and however it is reached.

What it is: every public coroutine function of the theme modules is a scenario: it is given a client of an empty store (`store`), and
where it has such parameters, `restart` (end the store as it stands, open it again on the same data, give a client) and
`elsewhere` (another client of the same store). `needs(...)` says with which options the store is opened. `ways` opens stores
in this process; tests/integration/test_store_catalogue_actor.py does through the actor.
Who calls it: tests/unit/test_store_catalogue.py, tests/integration/test_store_catalogue_actor.py.
"""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

from store_catalogue import (
    attempts,
    beyond,
    creation,
    ends,
    health,
    queries,
    queue,
    resources,
    spans,
    spans_read,
    workers,
)
from store_catalogue.common import Scenario

THEMES: tuple[ModuleType, ...] = (
    *(creation, queue, queries, resources, workers, spans, spans_read, ends, attempts),
    *(health, beyond),
)


def scenarios() -> list[Scenario]:
    """All of them, in order of theme and file."""
    return [
        found
        for theme in THEMES
        for name, found in vars(theme).items()
        if inspect.iscoroutinefunction(found)
        and found.__module__ == theme.__name__
        and not name.startswith("_")
    ]


def label(scenario: Scenario) -> str:
    return f"{scenario.__module__.rpartition('.')[2]}.{scenario.__name__}"


def options_of(scenario: Scenario) -> dict[str, Any]:
    """How the store is to be opened, as `StoreCore.open` takes it."""
    return getattr(scenario, "options", {})


def wants(scenario: Scenario, name: str) -> bool:
    """Whether the scenario has a parameter of this name."""
    return name in inspect.signature(scenario).parameters
