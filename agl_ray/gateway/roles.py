"""Who answers a call: the role in its URL, or none, names an engine of ours or a model outside.

Called by: the door, which asks `Roles.of` for every call; `actors/gateway.py` fills the table from the config section `roles`. Test alone:
`pytest tests/unit/test_gateway_roles.py`.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from agl_ray.gateway.canonical import Refusal
from agl_ray.gateway.engine_api import GenerateChunk, GenerateRequest, GenerateResult
from agl_ray.gateway.overlong import answer_mark
from agl_ray.gateway.render import Renderer
from agl_ray.gateway.upstream import Upstream
from agl_ray.types import EngineError


class EngineLost(EngineError):
    """The engine replica died or could not be reached: the same call may be sent to another one."""


class EngineClient(Protocol):
    """The engine as the door sees it. Cancelling either call aborts it in the engine."""

    async def generate(self, request: GenerateRequest) -> GenerateResult: ...

    def generate_stream(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]: ...


@dataclass(frozen=True)
class EngineRole:
    """An engine of ours, and the tokenizer of its model. Only the calls of kind `train` are trained."""

    engine: EngineClient
    renderer: Renderer
    kind: Literal["train", "frozen"] = "train"
    adapter: str | None = None
    """As in GenerateRequest."""

    @property
    def trained(self) -> bool:
        return self.kind == "train"

    @functools.cached_property
    def mark(self) -> tuple[int, ...]:
        """See `answer_mark`."""
        return answer_mark(self.renderer)


@dataclass(frozen=True)
class OutsideRole:
    """A model outside. Its calls are recorded without token ids."""

    upstream: Upstream


class Roles:
    """The table: `default` answers calls whose URL names no role (None: they are refused), `named` the others."""

    def __init__(
        self,
        default: EngineRole | None,
        named: Mapping[str, EngineRole | OutsideRole] | None = None,
    ) -> None:
        self._default, self._named = default, dict(named or {})

    def of(self, name: str | None) -> EngineRole | OutsideRole:
        """Refusal 404 that lists the roles where there is no such one."""
        if name is None and self._default is not None:
            return self._default
        if name is None:
            raise Refusal(
                404,
                f"a call without a role: this run trains an adapter for each role, so every URL must name one of {', '.join(sorted(self._named))} "
                "(ctx.llm(ROLE), or /role/ROLE in it)",
                param="role",
                code="role_not_found",
            )
        if name not in self._named:
            known = ", ".join(sorted(self._named))
            expected = f"expected one of {known}" if known else "this run's config has no `roles`"
            raise Refusal(
                404,
                f"unknown role {name!r}: {expected}; leave /role/{name} out of the URL for the run's own engine",
                param="role",
                code="role_not_found",
            )
        return self._named[name]
