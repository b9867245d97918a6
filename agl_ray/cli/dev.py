"""`agl-ray dev`: an agent on a few rows against any endpoint, with no training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from agl_ray.types import NamedResources

Agent = Annotated[
    str,
    typer.Argument(
        metavar="AGENT",
        help="path/file.py:function or module:function; or a command: --command, then its words.",
    ),
]
Data = Annotated[
    str, typer.Option("--data", metavar="FILE", help=".jsonl, .parquet, or file.py:function.")
]
Rows = Annotated[int, typer.Option("--rows", min=1, help="How many rows, from the first on.")]
BaseUrl = Annotated[
    str | None,
    typer.Option(
        "--base-url", metavar="URL", help="OpenAI-compatible server (else OPENAI_BASE_URL)."
    ),
]
Model = Annotated[str, typer.Option("--model", metavar="NAME", help="A model that it has.")]
Mode = Annotated[str, typer.Option("--mode", help="train; val or test for the validation method.")]
Timeout = Annotated[
    float | None, typer.Option("--timeout", min=0.001, help="Deadline of a row in seconds.")
]
Command = Annotated[
    bool, typer.Option("--command", help="AGENT is a command line, such as 'node agent.js'.")
]

Role = Annotated[
    list[str] | None,
    typer.Option(
        "--role",
        metavar="NAME[=MODEL]",
        help="A role that the agent asks for, and its model at the server (else --model's); may be repeated.",
    ),
]
Template = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt-template",
        metavar="[NAME=]FILE",
        help="The text of FILE as a prompt template, under the name prompt_template or NAME; may be repeated.",
    ),
]


def dev(
    agent: Agent,
    data: Data,
    model: Model,
    base_url: BaseUrl = None,
    rows: Rows = 3,
    mode: Mode = "train",
    timeout: Timeout = None,
    command: Command = False,
    role: Role = None,
    prompt_template: Template = None,
) -> None:
    """Try AGENT on a few rows of --data, in this process: breakpoints work, nothing is trained.

    \b
    Examples:
      agl-ray dev agent.py:solve --data tasks.jsonl --base-url http://127.0.0.1:8000/v1 --model qwen
      agl-ray dev team.py:solve --role planner --role judge=big --prompt-template ask.txt --data tasks.jsonl --model qwen
      agl-ray dev 'node agent.js' --command --data tasks.jsonl --rows 1 --base-url http://127.0.0.1:8000/v1 --model qwen

    Prints the call tree of each row with tokens, rewards and timing. The key, where the server wants one, is OPENAI_API_KEY's. Roles are
    all answered by this server; from Python, Trainer.dev takes them from the configuration, those outside with their own. Exit code 1
    when no row ended ok.
    """
    import shlex

    from agl_ray.agents import CommandAgent, as_agent
    from agl_ray.agents.dev import develop
    from agl_ray.agents.dev_show import show_total, show_tried
    from agl_ray.config import load_object, load_rows
    from agl_ray.types import EndReason

    here = Path.cwd()
    given = load_rows(data, 0, [], here)[:rows]
    if command:
        program = CommandAgent(shlex.split(agent))
        program.check()
        found = as_agent(program)
    else:
        found = as_agent(load_object(agent, here), what=f"agent {agent!r}")
    tried = develop(
        found,
        given,
        base_url=base_url,
        model=model,
        resources=_templates(prompt_template or []),
        roles=_roles(role or []),
        mode=mode,
        timeout_seconds=timeout,
        shown=show_tried,
    )
    show_total(tried)
    if not any(one.outcome.reason is EndReason.OK for one in tried):
        raise typer.Exit(1)


def _roles(given: list[str]) -> dict[str, str | None]:
    """`NAME[=MODEL]` as role -> model. InputError for a name that no role may have, or one that is there twice."""
    from pydantic import TypeAdapter, ValidationError

    from agl_ray.config.roles import RoleName
    from agl_ray.types import InputError

    roles: dict[str, str | None] = {}
    for text in given:
        name, sign, model = text.partition("=")
        try:
            TypeAdapter(RoleName).validate_python(name)
        except ValidationError as error:
            said = error.errors()[0]["msg"]
            raise InputError(f"--role {text}: {name!r} is no role's name: {said}") from error
        if sign and not model:
            raise InputError(f"--role {text}: expected a model behind the =, got none")
        if name in roles:
            raise InputError(f"--role {text}: the role {name!r} is given twice; give it once")
        roles[name] = model or None
    return roles


def _templates(given: list[str]) -> NamedResources:
    """`[NAME=]FILE` as resources. InputError for a file that cannot be read, and for a name that is taken."""
    from agl_ray.types import InputError, PromptTemplate

    templates: NamedResources = {}
    for text in given:
        name, sign, file = text.partition("=")
        name, file = (name, file) if sign else ("prompt_template", text)
        if not name or name == "main_llm" or name in templates:
            raise InputError(
                f"--prompt-template {text}: expected a name that is free, got {name!r}; write NAME=FILE"
            )
        try:
            templates[name] = PromptTemplate(template=Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"--prompt-template {text}: expected a text file, cannot read {file!r}: {error}"
            ) from error
    return templates
