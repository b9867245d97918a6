"""The task of the quickstart: arithmetic questions in words, such as "what is forty-seven plus 385?".

`train` and `val` are what configs/quickstart.yaml names as its data. Questions are split by their numbers a and b alone, with
`part(a, b)`, a hash modulo 10, so that no pair of numbers occurs on both sides whatever the phrasing:

    part 0     held out: `val`, the 256 questions of validation, the same for every seed
    part 1     `skill_check`: tells the warm start when to stop (base_model.py); never trained on either
    part 2..9  training questions, for the warm start and for reinforcement learning

Run `python examples/quickstart/task.py` to see a few rows.
"""

from __future__ import annotations

import random
import re
import zlib
from typing import NamedTuple

ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
    "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen",
    "eighteen", "nineteen",
]  # fmt: skip
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
PHRASINGS = [
    ("+", "what is {a} plus {b}?"),
    ("+", "{a} plus {b} equals?"),
    ("+", "add {a} and {b}"),
    ("-", "what is {a} minus {b}?"),
    ("-", "{a} minus {b} equals?"),
    ("-", "subtract {b} from {a}"),
    ("*", "what is {a} times {b}?"),
    ("*", "multiply {a} by {b}"),
]
WORD_SHARE = 0.35  # of the numbers below 100 are written as words
HELD_OUT, SKILL_CHECK = 0, 1
VAL_ROWS, TRAIN_ROWS = 256, 4000


class Question(NamedTuple):
    """A question with all that the warm start needs to know about it: its operator and its numbers."""

    text: str
    operator: str
    a: int
    b: int

    @property
    def answer(self) -> int:
        return compute(self.a, self.operator, self.b)

    def row(self) -> dict[str, str | int]:
        return {"question": self.text, "answer": self.answer}


def compute(a: int, operator: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[operator]


def part(a: int, b: int) -> int:
    """Which tenth of the questions the numbers (a, b) belong to, 0 to 9."""
    return zlib.crc32(f"{a},{b}".encode()) % 10


def is_right(text: str, answer: int) -> bool:
    """Whether the last integer in `text` is the answer: "The answer is -338." is right for -338."""
    found = re.findall(r"-?\d+", text)
    return bool(found) and int(found[-1]) == answer


def in_words(number: int) -> str:
    """The English words of a number from 0 to 99: 47 -> "forty-seven"."""
    if number < 20:
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens - 2] + (f"-{ONES[ones]}" if ones else "")


def _number(rng: random.Random) -> int:
    digits = rng.choices((1, 2, 3), weights=(20, 40, 40))[0]
    return rng.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)


def draw(rng: random.Random, parts: set[int], word_share: float = WORD_SHARE) -> Question:
    """A random question whose numbers belong to one of `parts`; `word_share` of those below 100 are in words."""

    def spelled(number: int) -> str:
        return in_words(number) if number < 100 and rng.random() < word_share else str(number)

    while True:
        a, b = _number(rng), _number(rng)
        if part(a, b) in parts:
            break
    operator, phrasing = rng.choice(PHRASINGS)
    return Question(phrasing.format(a=spelled(a), b=spelled(b)), operator, a, b)


def distinct(rng: random.Random, parts: set[int], count: int) -> list[Question]:
    """`count` questions, no text twice."""
    found: dict[str, Question] = {}
    while len(found) < count:
        question = draw(rng, parts)
        found.setdefault(question.text, question)
    return list(found.values())


TRAIN_PARTS = set(range(10)) - {HELD_OUT, SKILL_CHECK}


def train(seed: int) -> list[dict[str, str | int]]:
    """4000 training rows {"question": str, "answer": int}, drawn anew for each seed."""
    rng = random.Random(f"train {seed}")
    return [question.row() for question in distinct(rng, TRAIN_PARTS, TRAIN_ROWS)]


def val(seed: int) -> list[dict[str, str | int]]:
    """The 256 held-out rows. The same for every seed, so that runs can be compared."""
    rng = random.Random("held out")
    return [question.row() for question in distinct(rng, {HELD_OUT}, VAL_ROWS)]


def skill_check(count: int) -> list[dict[str, str | int]]:
    """`count` rows that neither training nor validation uses: the warm start stops by its success on them."""
    rng = random.Random("skill check")
    return [question.row() for question in distinct(rng, {SKILL_CHECK}, count)]


if __name__ == "__main__":
    for row in train(seed=0)[:8]:
        print(row["answer"], "=", row["question"])
