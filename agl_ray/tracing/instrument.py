"""Instrumentors: packages that make libraries write OpenTelemetry spans, found by their entry points and switched on.

`instrument("auto")` switches on what is installed of the two families for agents: `opentelemetry-instrumentation-genai-*` and, for libraries
that it does not serve, `openinference-instrumentation-*`. `instrument(["openai", ...])` switches on the named ones, of any family.
Who calls it: the runner, before it loads the agent. Test alone: tests/unit/test_tracing_instrument.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from agl_ray.types import ConfigError

log = logging.getLogger("agl_ray.tracing")

GROUP = "opentelemetry_instrumentor"
FAMILIES = ("opentelemetry-instrumentation-genai-", "openinference-instrumentation-")


def instrument(names: Sequence[str] | str) -> list[str]:
    """Switch instrumentors on; the packages that were. names: `auto`, `off`, or entry points (`openai`) or packages
    (`openinference-instrumentation-openai`).

    ConfigError where a named one is not installed or refuses; with `auto` a refusal is logged.
    """
    if names == "off":
        return []
    found = sorted(entry_points(group=GROUP), key=_package)
    if names == "auto":
        return [_package(one) for one in _automatic(found) if _switched_on(one)]
    return [_demanded(name, found) for name in names]


def _automatic(found: Iterable[EntryPoint]) -> list[EntryPoint]:
    """One per library: of the first family that serves it."""
    chosen: dict[str, EntryPoint] = {}
    known = list(found)
    for family in FAMILIES:
        for one in known:
            if _package(one).startswith(family):
                chosen.setdefault(_package(one).removeprefix(family), one)
    return list(chosen.values())


def _switched_on(one: EntryPoint) -> bool:
    try:
        _activate(one)
    except Exception as error:  # noqa: BLE001  a package that does not fit its library may raise anything
        log.warning("tracing.instrument: %s is left off: %s", _package(one), error)
        return False
    return True


def _demanded(name: str, found: list[EntryPoint]) -> str:
    matching = [one for one in found if name in (_package(one), one.name)]
    if not matching:
        known = sorted({_package(one) for one in found}) or "none"
        raise ConfigError(
            f"tracing.instrument: {name!r}: expected an installed instrumentor, got none of this name; installed: {known}"
        )
    # A name that several packages have: the family for agents first.
    one = (_automatic(matching) or matching)[0]
    try:
        _activate(one)
    except Exception as error:
        raise ConfigError(f"tracing.instrument: {name!r} ({_package(one)}): {error}") from error
    return _package(one)


def _activate(one: EntryPoint) -> None:
    instrumentor: Any = one.load()()
    if getattr(instrumentor, "is_instrumented_by_opentelemetry", False):
        return
    instrumentor.instrument()
    if not getattr(instrumentor, "is_instrumented_by_opentelemetry", True):
        raise ImportError("it refused: the library that it serves is missing or of another version")


def _package(one: EntryPoint) -> str:
    return "" if one.dist is None else one.dist.name.replace("_", "-").lower()
