"""A calculator agent: an LLM that may call one tool, written with the plain OpenAI client.

It knows nothing of reinforcement learning. Point it at any OpenAI-compatible endpoint that supports tools:

    OPENAI_BASE_URL=http://localhost:8000/v1 OPENAI_API_KEY=none python agent.py --model NAME "what is 47 plus 385?"
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import functools
import json
import operator
from typing import Any

from openai import AsyncOpenAI

SYSTEM_PROMPT = "You are a calculator agent."
MAX_TURNS = 3
MAX_DIGITS = 12  # of a result; the calculator's display is no wider
KEYS = set("0123456789+-*/%() ")

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "calculator",
            "description": "Evaluate an arithmetic expression such as 12*7+5.",
            "parameters": {
                "type": "object",
                "properties": {"expression": {"type": "string"}},
                "required": ["expression"],
            },
        },
    }
]

BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def evaluate(node: ast.expr) -> int:
    """The value of an expression of integers, + - * // % and brackets; ValueError for anything else."""
    match node:
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            value = number
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = -evaluate(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            value = BINARY[type(op)](evaluate(left), evaluate(right))
        case _:
            raise ValueError(f"not arithmetic: {ast.dump(node)}")
    if abs(value) >= 10**MAX_DIGITS:
        raise ValueError(f"more than {MAX_DIGITS} digits")
    return value


def calculator(expression: str) -> str:
    """The tool: the result as text, or "error"."""
    if not KEYS.issuperset(expression):
        return "error"
    try:
        return str(evaluate(ast.parse(expression.strip(), mode="eval").body))
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
        return "error"


def run_tool(name: str, arguments: str) -> str:
    """What the tool `name` answers to `arguments`, the JSON text of the model's tool call."""
    try:
        expression = json.loads(arguments)["expression"]
    except (ValueError, KeyError, TypeError):
        return "error"
    if name != "calculator" or not isinstance(expression, str):
        return "error"
    return calculator(expression)


@functools.lru_cache(maxsize=4)
def shared_client(loop: asyncio.AbstractEventLoop) -> AsyncOpenAI:
    """One client per event loop: a client of its own for every question would cost 20 ms (it loads TLS certificates)."""
    return AsyncOpenAI(api_key="unset")


async def ask(question: str, *, model: str, base_url: str | None = None, api_key: str) -> str:
    """The agent's answer to `question`: at most three turns, each a call of the calculator or the final words.

    Returns the text of the last message; an empty text where the third turn still asked for a tool.
    """
    shared = shared_client(asyncio.get_running_loop())
    client = shared.with_options(base_url=base_url, api_key=api_key)
    messages: list[Any] = [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": question},
    ]
    for _ in range(MAX_TURNS):
        completion = await client.chat.completions.create(
            model=model, messages=messages, tools=TOOLS
        )
        message = completion.choices[0].message
        if not message.tool_calls:
            return message.content or ""
        messages.append(message.to_dict())
        for call in message.tool_calls:
            result = run_tool(call.function.name, call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return ""


if __name__ == "__main__":
    import os

    parser = argparse.ArgumentParser(description="Ask the calculator agent.")
    parser.add_argument("question")
    parser.add_argument("--model", required=True)
    options = parser.parse_args()
    key = os.environ.get("OPENAI_API_KEY", "none")
    print(asyncio.run(ask(options.question, model=options.model, api_key=key)))
