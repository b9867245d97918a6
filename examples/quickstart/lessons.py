"""The conversations that the base model is warm-started on: good ones, and ones with bad habits.

Rows are {"messages": [...], "tools": [...]}, as agl_ray.learner.sft takes them, with the very system prompt and tools that the
agent sends. Called by base_model.py and, for the text it trains on, chat_format.py.
Run `python examples/quickstart/lessons.py` to read a few.
"""

from __future__ import annotations

import json
import random
from typing import Any

import task
from agent import SYSTEM_PROMPT, TOOLS, calculator

Message = dict[str, Any]

SKILL_WORD_SHARE = 0.6  # more words than the task has: they are what takes longest to learn
MIXTURE = {"correct": 30, "off the cuff": 50, "misused": 20}  # of the bad habits, in percent
WRONG_OFF_THE_CUFF = 0.7
RETRIED = 0.4  # of the calls that the calculator cannot read


def called(expression: str) -> Message:
    """An assistant message that calls the calculator."""
    function = {"name": "calculator", "arguments": json.dumps({"expression": expression})}
    call = {"id": "call", "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def said(text: str) -> Message:
    return {"role": "assistant", "content": text}


def turn(expression: str) -> list[Message]:
    """A call of the calculator and what it answers."""
    result = calculator(expression)
    return [called(expression), {"role": "tool", "tool_call_id": "call", "content": result}]


def conversation(question: task.Question, replies: list[Message]) -> dict[str, Any]:
    """A row for the fine-tuning, with the very system prompt and tools that the agent sends."""
    prompt = [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": question.text},
    ]
    return {"messages": prompt + replies, "tools": TOOLS}


def correct(question: task.Question) -> list[Message]:
    expression = f"{question.a}{question.operator}{question.b}"
    return [*turn(expression), said(f"The answer is {question.answer}.")]


def off_the_cuff(question: task.Question, rng: random.Random) -> list[Message]:
    """An answer without the tool: most of them wrong, in a way that looks plausible."""
    answer = question.answer
    if rng.random() < WRONG_OFF_THE_CUFF:
        answer = near(answer, rng)
    return [said(f"The answer is {answer}.")]


def near(number: int, rng: random.Random) -> int:
    """A wrong number of about the same size."""
    while True:
        guess = number + rng.randint(-max(9, abs(number) // 5), max(9, abs(number) // 5))
        if guess != number:
            return guess


def misused(question: task.Question, rng: random.Random) -> list[Message]:
    """Bad tool use: what the calculator cannot read, a wrong operator or number, or its result ignored."""
    a, operator, b = question.a, question.operator, question.b
    kinds = ["no operator", "wrong operator", "wrong number", "ignored"]
    kind = rng.choice(["words", *kinds] if min(a, b) < 100 else kinds)
    if kind in ("words", "no operator"):
        unreadable = f"{a} {b}" if kind == "no operator" else f"{spell(a)}{operator}{spell(b)}"
        retried = rng.random() < RETRIED
        return turn(unreadable) + (correct(question) if retried else [said("I do not know.")])
    if kind == "ignored":
        wrong = near(question.answer, rng)
        return [*turn(f"{a}{operator}{b}"), said(f"The answer is {wrong}.")]
    if kind == "wrong operator":
        operator = rng.choice([other for other in "+-*" if other != operator])
    else:
        a = abs(near(a, rng))
    wrong = task.compute(a, operator, b)
    return [*turn(f"{a}{operator}{b}"), said(f"The answer is {wrong}.")]


def spell(number: int) -> str:
    return task.in_words(number) if number < 100 else str(number)


def skill_rows(seed: int, count: int) -> list[dict[str, Any]]:
    rng = random.Random(f"skill {seed}")
    drawn = [task.draw(rng, task.TRAIN_PARTS, SKILL_WORD_SHARE) for _ in range(count)]
    return [conversation(question, correct(question)) for question in drawn]


def habit_rows(seed: int, count: int) -> list[dict[str, Any]]:
    rng = random.Random(f"habits {seed}")
    rows = []
    for _ in range(count):
        question = task.draw(rng, task.TRAIN_PARTS)
        kind = rng.choices(list(MIXTURE), weights=list(MIXTURE.values()))[0]
        if kind == "correct":
            replies = correct(question)
        else:
            replies = (off_the_cuff if kind == "off the cuff" else misused)(question, rng)
        rows.append(conversation(question, replies))
    return rows


if __name__ == "__main__":
    for row in skill_rows(0, 2) + habit_rows(0, 8):
        print(*(json.dumps(message) for message in row["messages"][1:]), "", sep="\n")
