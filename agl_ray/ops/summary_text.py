"""The last screen of a run, made from its summary: before and after, where the time went, what failed, examples, what next.

Plain ASCII text that reads the same in a terminal and in a log. Called by the displays. Test alone:
tests/unit/test_ops_summary.py; see one: `python tests/unit/test_ops_display.py`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agl_ray.ops.numbers import bar, duration

Summary = Mapping[str, Any]
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
BAR = 30


def render_summary(summary: Summary, width: int = 100, config_file: str | None = None) -> str:
    """The closing text, lines of at most `width` characters; `config_file` is what the proposed commands name."""
    parts = [
        _validation(summary["validation"]),
        _time(summary["seconds"]),
        _attempts(summary, width),
        _examples(summary.get("examples") or [], width),
        _where(summary),
        _next(summary, config_file),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _validation(validation: Summary) -> str:
    lines = [f"Held-out rows (n = {validation['n']}), mean reward:"]
    for name in ("before", "after"):
        mean, interval = validation[name], validation[f"ci95_{name}"]
        if mean is None:
            lines.append(f"  {name:<7} not measured")
            continue
        low, high = interval
        lines.append(f"  {name:<7} {mean:.3f}  {bar(mean, BAR)}  95 % CI {low:.3f} to {high:.3f}")
    return "\n".join(lines)


def _time(seconds: Mapping[str, float]) -> str:
    total = seconds["total"]
    lines = ["Where the time went:"]
    for name, spent in seconds.items():
        if name == "total" or (spent < 0.05 and name != "idle"):
            continue
        share = spent / total if total else 0.0
        lines.append(f"  {name:<11} {duration(spent):>12}  {bar(share, BAR)} {100 * share:3.0f} %")
    lines.append(f"  {'total':<11} {duration(total):>12}")
    return "\n".join(lines)


def _attempts(summary: Summary, width: int) -> str:
    attempts = summary["attempts"]
    failed = {reason: n for reason, n in attempts.items() if n and reason != "ok"}
    words = ", ".join(f"{reason} {count}" for reason, count in failed.items()) or "none"
    lines = [
        f"Attempts: {sum(attempts.values())}, of them ok {attempts.get('ok', 0)}; not ok: {words}."
    ]
    largest = summary["max_logprob_diff"]
    lines.append(
        f"Updates: {summary['updates']}; weight versions: {summary['weight_versions']}; re-tokenised tokens: "
        f"{summary['retokenized_tokens']}; largest log-probability difference engine/learner: "
        f"{'not compared' if largest is None else f'{largest:.1e}'}."
    )
    if summary["events"]:
        lines.append("What happened on the way:")
        lines += [f"  - {text}" for text in summary["events"]]
    return "\n".join(line for each in lines for line in _wrapped(each, width))


def _wrapped(line: str, width: int) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip(" -")) if line.startswith(" ") else 0)
    return textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False) or [""]


def _examples(examples: Sequence[Summary], width: int) -> str:
    """Each example's conversation before (left) and after (right)."""
    column = (width - 5) // 2
    lines: list[str] = []
    for number, example in enumerate(examples, 1):
        lines += [] if number == 1 else [""]
        left, right = (_conversation(example.get(side), column) for side in ("before", "after"))
        titles = [f"Example {number}, before{_reward(example.get('before'))}"]
        titles.append(f"after{_reward(example.get('after'))}")
        lines.append(f"  {titles[0]:<{column}} | {titles[1]}".rstrip())
        for index in range(max(len(left), len(right))):
            cells = [side[index] if index < len(side) else "" for side in (left, right)]
            lines.append(f"  {cells[0]:<{column}} | {cells[1]}".rstrip())
    return "\n".join(lines)


def _reward(side: Summary | None) -> str:
    if side is None:
        return ""
    reward = side.get("reward")
    return " (no reward)" if reward is None else f" (reward {reward:g})"


def _conversation(side: Summary | None, width: int) -> list[str]:
    """The messages of a conversation without its system prompt, a `role: text` paragraph each."""
    if side is None:
        return ["(none)"]
    lines: list[str] = []
    for message in side.get("messages") or []:
        if message.get("role") == "system":
            continue
        text = message_line(message)
        lines += textwrap.wrap(text, width, subsequent_indent="  ") or [text]
    if side.get("error"):
        text = _printable(f"error: {side['error']}")
        lines += textwrap.wrap(text, width, subsequent_indent="  ")
    return lines or ["(no messages)"]


def message_line(message: Summary) -> str:
    """A chat message in one printable line: `role: words and tool calls`."""
    return _printable(f"{message.get('role', '?')}: {_content(message)}")


def _printable(text: str) -> str:
    """ASCII, and no control character but white space, which wrapping takes: a model's words move no cursor and break no line."""
    ascii_only = text.encode("ascii", "backslashreplace").decode()
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", ascii_only)


def _content(message: Summary) -> str:
    """Text and tool calls of a chat message in one line."""
    content = message.get("content")
    if isinstance(content, list):
        content = " ".join(str(part.get("text", f"[{part.get('type')}]")) for part in content)
    calls = []
    for call in message.get("tool_calls") or []:
        function = call.get("function") or {}
        calls.append(f"{function.get('name')}({_arguments(function.get('arguments'))})")
    return " ".join(str(part) for part in (content, *calls) if part) or "(empty)"


def _arguments(arguments: Any) -> str:
    """`expression='47+385'` from the JSON text of a tool call's arguments; what is no JSON stays as it is."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return arguments
    if isinstance(arguments, dict):
        return ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return str(arguments)


def _where(summary: Summary) -> str:
    folder = summary.get("run_folder")
    if not folder:
        return ""
    return (
        f"Run folder: {_near(folder)}\n"
        "  config.json, metrics.jsonl, summary.json, curves.png, store.db, checkpoints/, export/ (the trained model)"
    )


def _next(summary: Summary, config_file: str | None) -> str:
    folder = summary.get("run_folder")
    config = config_file or (f"{_near(folder)}/config.json" if folder else "CONFIG")
    program = _program()
    commands = [
        (f"{program} train {config} seed={summary['seed'] + 1}", "the same with another seed"),
        (f"{program} config {config}", "every setting, with its value"),
        (f"{program} bench e2e --quick --json bench.json", "how close the loop is to the ideal"),
    ]
    wide = max(len(command) for command, _ in commands)
    return "Try next:\n" + "\n".join(f"  {command:<{wide}}  # {why}" for command, why in commands)


def _program() -> str:
    """`agl-ray`, or its path where the shell would not find it (the environment is not activated)."""
    here = Path(sys.executable).parent / "agl-ray"
    return "agl-ray" if shutil.which("agl-ray") or not here.exists() else _near(str(here))


def _near(path: str) -> str:
    """The path from the current directory, where that is below it."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative
