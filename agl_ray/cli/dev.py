"""`agl-ray dev`: an agent on a few rows against any endpoint, with no training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
Mode = Annotated[str, typer.Option("--mode", help="train, or val for the validation method.")]
Timeout = Annotated[
    float | None, typer.Option("--timeout", min=0.001, help="Deadline of a row in seconds.")
]
Command = Annotated[
    bool, typer.Option("--command", help="AGENT is a command line, such as 'node agent.js'.")
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
) -> None:
    """Try AGENT on a few rows of --data, in this process: breakpoints work, nothing is trained.

    \b
    Examples:
      agl-ray dev agent.py:solve --data tasks.jsonl --base-url http://127.0.0.1:8000/v1 --model qwen
      agl-ray dev 'node agent.js' --command --data tasks.jsonl --rows 1 --base-url http://127.0.0.1:8000/v1 --model qwen

    Prints the call tree of each row with tokens, rewards and timing. The key, where the server wants one, is OPENAI_API_KEY's. Exit code
    1 when no row ended ok.
    """
    import shlex

    from agl_ray.agents import CommandAgent, as_agent
    from agl_ray.agents.dev import develop
    from agl_ray.agents.dev_show import show_total, show_tried
    from agl_ray.config import load_object, load_rows
    from agl_ray.types import EndReason

    if mode not in ("train", "val"):
        raise typer.BadParameter(f"expected train or val, got {mode!r}", param_hint="--mode")
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
        mode=mode,
        timeout_seconds=timeout,
        shown=show_tried,
    )
    show_total(tried)
    if not any(one.outcome.reason is EndReason.OK for one in tried):
        raise typer.Exit(1)
