"""What was tried, for people: a call tree per row, and the sum of all. Called by `agl-ray dev` and `Trainer.dev`. Test alone:
tests/unit/test_agents_dev.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec
from rich.console import Console
from rich.markup import escape

from agl_ray.agents.dev import Tried
from agl_ray.ops.call_tree import call_tree, totals
from agl_ray.types import EndReason

ROW = 60  # characters of a row that are shown


def show_tried(tried: Tried) -> None:
    """Print the call tree of a row."""
    console = Console(soft_wrap=True)
    outcome = tried.outcome
    calls, prompt, response = totals(tried.spans)
    row = msgspec.json.encode(tried.row).decode()
    row = row if len(row) <= ROW else row[: ROW - 3] + "..."
    good = outcome.reason is EndReason.OK
    end = f"[green]ok  reward {outcome.reward:g}[/]" if good else f"[red]{outcome.reason}[/]"
    title = f"[bold]row {tried.number}[/]  {escape(row)}  {end}  {tried.seconds:.2f} s  "
    title += f"{calls} calls, {prompt} + {response} tokens"
    console.print(call_tree(title, tried.spans))
    if outcome.error:
        console.print(f"  [red]{escape(outcome.error)}[/]")


def show_total(tried: Sequence[Tried]) -> None:
    """Print the sum of all rows."""
    ends = Counter(str(one.outcome.reason) for one in tried)
    rewards = [one.outcome.reward for one in tried if one.outcome.reward is not None]
    calls, prompt, response = totals([span for one in tried for span in one.spans])
    mean = f", mean reward {sum(rewards) / len(rewards):.3f}" if rewards else ""
    print(
        f"{len(tried)} rows: {', '.join(f'{n} {reason}' for reason, n in ends.items())}{mean}, "
        f"{calls} calls, {prompt} + {response} tokens, {sum(one.seconds for one in tried):.1f} s"
    )
