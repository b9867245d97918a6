"""The quickstart's questions: right answers, and no numbers shared between training, skill check and validation."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "quickstart"))

import task

WORDS = {task.in_words(number): number for number in range(100)}


def numbers(text: str) -> tuple[int, int]:
    """The two numbers of a question, in the order written, read back independently of the generator."""
    found = re.findall("|".join([r"\d+", *sorted(WORDS, key=len, reverse=True)]), text)
    first, second = (WORDS[word] if word in WORDS else int(word) for word in found)
    return first, second


def recomputed(text: str) -> tuple[int, int, int]:
    """(a, b, answer) of a question by reading it."""
    first, second = numbers(text)
    if text.startswith("subtract"):
        return second, first, second - first
    if "minus" in text:
        return first, second, first - second
    if "plus" in text or text.startswith("add"):
        return first, second, first + second
    return first, second, first * second


@pytest.mark.parametrize(
    ("rows", "parts"),
    [(task.train(0), set(range(2, 10))), (task.val(0), {0}), (task.skill_check(96), {1})],
)
def test_answers_are_right_and_numbers_belong_to_the_split(
    rows: list[dict], parts: set[int]
) -> None:
    for row in rows:
        a, b, answer = recomputed(row["question"])
        assert answer == row["answer"], row
        assert task.part(a, b) in parts, row


def test_sizes_and_seeds() -> None:
    assert len(task.train(0)) == 4000
    assert len({row["question"] for row in task.train(3)}) == 4000
    assert task.train(0) == task.train(0) != task.train(1)
    assert task.val(0) == task.val(7)
    assert len({row["question"] for row in task.val(0)}) == 256


def test_all_phrasings_and_operators_occur() -> None:
    rng = random.Random(0)
    drawn = [task.draw(rng, {0}) for _ in range(400)]
    assert {question.operator for question in drawn} == set("+-*")
    assert any("-" in question.text and question.operator == "+" for question in drawn)  # words


def test_words() -> None:
    assert [task.in_words(n) for n in (0, 13, 20, 47, 99)] == [
        "zero",
        "thirteen",
        "twenty",
        "forty-seven",
        "ninety-nine",
    ]
