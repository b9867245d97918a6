"""The key `agent` where it is a program: `agent: {command: [...]}`.

Called by `agl_ray.config.models`; `agl_ray.agents.command` says what such a program gets and gives. Test alone: tests/unit/test_agents_command.py.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from agl_ray.config.section import Section

NAMED, COMMAND = FORMS = ("agent as a name", "agent as a command")
"""How pydantic calls the two forms in the places of its errors."""


class CommandConfig(Section):
    command: Annotated[list[str], Field(min_length=1)]
    """The program that is started for each rollout, and its arguments."""
    cwd: str | None = None
    """Its working directory, relative to the configuration file; None: the folder of the configuration file."""
    env: dict[str, str] = {}
    """Further environment variables."""
    env_map: dict[str, str] = {}
    """Environment variables from the task: name -> `input.field`."""


def _form(value: Any) -> str:
    return NAMED if isinstance(value, str) else COMMAND


AgentKey = Annotated[
    Annotated[str, Tag(NAMED)] | Annotated[CommandConfig, Tag(COMMAND)], Discriminator(_form)
]
