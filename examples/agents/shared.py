"""What the example agents have in common: their tool and their command line. Nothing of agl_ray is imported here or in them.

An agent is a program:

    OPENAI_BASE_URL=... OPENAI_API_KEY=... python with_langgraph.py --model NAME [--api chat|responses] [--stream] QUESTION...

It puts the questions one after another into one conversation, and prints its answers as one line of JSON, a list of texts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

SYSTEM_PROMPT = "You are a calculator agent."
OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


@dataclass(frozen=True)
class Options:
    """What to ask whom, and how."""

    questions: list[str]
    model: str
    api: str
    stream: bool


def calculator(expression: str) -> str:
    """Evaluate one operation of two whole numbers.

    Args:
        expression: such as 12*7
    """
    parts = re.fullmatch(r"\s*(-?\d+)\s*([+*-])\s*(-?\d+)\s*", expression)
    if parts is None:
        return "error: expected two whole numbers with + - or * between them"
    left, sign, right = parts.groups()
    return f"{left}{sign}{right}={OPERATIONS[sign](int(left), int(right))}"


def main(agent: Callable[[Options], Awaitable[list[str]]], *apis: str) -> None:
    """Run `agent`, which can speak `apis` (the first unless --api says otherwise), as a program."""
    parser = argparse.ArgumentParser(description="Ask a calculator agent.")
    parser.add_argument("questions", nargs="+", metavar="QUESTION")
    parser.add_argument("--model", required=True)
    parser.add_argument("--api", choices=apis, default=apis[0])
    parser.add_argument("--stream", action="store_true")
    given = parser.parse_args()
    answers = asyncio.run(agent(Options(given.questions, given.model, given.api, given.stream)))
    print("\n" + json.dumps(answers))  # a framework may have left a line without an end
