"""Trying an agent: a few rows, one after the other, against any OpenAI-compatible endpoint, with no training and no cluster.

    tried = develop(agent, rows, base_url="http://127.0.0.1:8000/v1", model="qwen", shown=print)

Everything runs in this process and in the thread that calls, so breakpoints work, and there is no deadline unless one is given. Called by
`agl-ray dev` and `Trainer.dev`. Test alone: tests/unit/test_agents_dev.py.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agl_ray.agents.agent import LitAgent
from agl_ray.agents.endpoint import Server, WatchedEndpoint
from agl_ray.agents.execute import Host, Place, run_agent
from agl_ray.agents.hooks import Hook
from agl_ray.agents.outcome import Outcome, settled
from agl_ray.config.roles import RoleConfig, endpoint_keys
from agl_ray.gateway.upstream import Api
from agl_ray.gateway.upstream_anthropic import AnthropicApi
from agl_ray.gateway.upstream_openai import OpenAIApi
from agl_ray.tracing import SpanRecorder, follow
from agl_ray.types import (
    LLM,
    MODES,
    Attempt,
    AttemptedRollout,
    InputError,
    NamedResources,
    Rollout,
    new_id,
)

_APIS: dict[str, tuple[Api, str]] = {
    "openai": (OpenAIApi(), ""),
    "anthropic": (AnthropicApi(), "/v1"),
}
"""Each with what belongs behind a role's `base_url`, which has no /v1 for Anthropic's."""


@dataclass(frozen=True)
class Tried:
    """One row that was tried. spans: rows of SPAN_SCHEMA, the model calls among them; seconds: of the agent."""

    number: int
    row: Any
    outcome: Outcome
    spans: list[dict[str, Any]]
    seconds: float


def develop(
    agent: LitAgent,
    rows: Sequence[Any],
    *,
    base_url: str | None = None,
    model: str | None = None,
    api_key: str | None = None,
    resources: NamedResources | None = None,
    roles: Mapping[str, str | None] | None = None,
    servers: Mapping[str, Server] | None = None,
    hooks: Sequence[Hook] = (),
    mode: str = "train",
    timeout_seconds: float | None = None,
    host: Host | None = None,
    shown: Callable[[Tried], None] = lambda tried: None,
) -> list[Tried]:
    """Run `agent` on each of `rows` and return how it went; `shown` is called after each.

    base_url, api_key: None takes OPENAI_BASE_URL and OPENAI_API_KEY. model: what the agent is told to ask for. resources: further ones
    (a prompt template), beside the LLM `main_llm`. roles: those that `ctx.llm(role)` knows, each with the model that it asks for, None: `model`;
    the server answers them all but those of `servers`. mode: train, val or test. InputError for any of these that makes no sense.
    """
    if mode not in MODES:
        raise InputError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if timeout_seconds is not None and not timeout_seconds > 0:
        raise InputError(
            f"timeout_seconds: expected a number above 0, or None for no deadline, got {timeout_seconds!r}"
        )
    base_url = base_url or os.environ.get("OPENAI_BASE_URL")
    if not base_url or not base_url.startswith(("http://", "https://")):
        raise InputError(
            f"base_url: expected the URL of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1, got {base_url!r}; "
            "give --base-url (base_url=), or set OPENAI_BASE_URL"
        )
    if not model:
        raise InputError("model: expected the name of a model that the server has, got none")
    key = api_key or os.environ.get("OPENAI_API_KEY")
    follow()
    tried = []
    # Not asyncio.run: it holds the first Ctrl-C back until a plain function has returned.
    loop = asyncio.new_event_loop()
    try:
        with WatchedEndpoint(base_url, servers) as endpoint:
            llm = LLM(endpoint=endpoint.url, model=model, api_key=key, roles=dict(roles or {}))
            given: NamedResources = {"main_llm": llm, **(resources or {})}
            for number, row in enumerate(rows, 1):
                work = _try(
                    *(agent, number, row, given, endpoint),
                    hooks=hooks,
                    mode=mode,
                    timeout_seconds=timeout_seconds,
                    host=host or Host(),
                )
                tried.append(loop.run_until_complete(work))
                shown(tried[-1])
    finally:
        loop.close()
    return tried


def servers_of(roles: Mapping[str, RoleConfig]) -> dict[str, Server]:
    """The servers of the roles of kind endpoint, with their keys. ConfigError names the variable of a key that is not set."""
    found, outside = {}, {name: role for name, role in roles.items() if role.kind == "endpoint"}
    keys = endpoint_keys(outside)
    for name, role in outside.items():
        api, behind = _APIS[role.api]
        found[name] = Server(str(role.base_url).rstrip("/") + behind, api.headers(keys.get(name)))
    return found


async def _try(
    agent: LitAgent,
    number: int,
    row: Any,
    resources: NamedResources,
    endpoint: WatchedEndpoint,
    *,
    hooks: Sequence[Hook],
    mode: str,
    timeout_seconds: float | None,
    host: Host,
) -> Tried:
    rollout_id, now = new_id("ro"), time.time()
    attempt = AttemptedRollout(
        rollout=Rollout(rollout_id=rollout_id, input=row, start_time=now, mode=mode),
        attempt=Attempt(
            rollout_id=rollout_id, attempt_id=new_id("at"), sequence_id=1, start_time=now
        ),
    )
    recorder = SpanRecorder(rollout_id, attempt.attempt_id)
    endpoint.watch(recorder)
    started = time.monotonic()
    outcome = await run_agent(
        *(agent, attempt, resources, recorder, timeout_seconds),
        hooks=hooks,
        host=host,
        place=Place.HERE,
    )
    seconds = time.monotonic() - started
    return Tried(number, row, settled(outcome), recorder.close(), seconds)
