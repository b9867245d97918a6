"""How a group of commands lists them: each with its whole first paragraph, where Typer would cut it off.

Used by `agl_ray.cli.{app,store,bench}`. Test alone: tests/unit/test_cli_app.py.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup


class Verbs(TyperGroup):
    """A group of commands whose help hides nothing of what they are."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [
            (name, " ".join((command.help or "").split("\n\n")[0].split()))
            for name, command in commands
            if command is not None and not command.hidden
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)
