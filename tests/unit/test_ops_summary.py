"""The summary: intervals, the keys that are promised, books that add up, and its text."""

from __future__ import annotations

from pathlib import Path

import pytest

from agl_ray.ops.numbers import bar, confidence_interval, duration, short, wilson
from agl_ray.ops.summary import make_summary, read_summary, write_summary
from agl_ray.ops.summary_text import render_summary
from agl_ray.types import EndReason

FACTS = {
    "before": [1.0, 0.0, 0.0, 0.0],
    "after": [1.0, 1.0, 1.0, 0.0],
    "attempts": {"ok": 10, "timeout": 2},
    "seconds": {"setup": 10.0, "rollout": 20.0, "checkpoint": 5.0},
    "total_seconds": 40.0,
    "updates": 3,
    "weight_versions": 4,
    "max_logprob_diff": 1e-6,
    "retokenized_tokens": 0,
    "seed": 7,
}


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Reference values: R's prop.test(correct = FALSE).
    [
        (52, 256, 0.1584, 0.2565),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_wilson(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-4)


def test_wilson_at_its_edges() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="successes"):
        wilson(11, 10)


def test_the_interval_of_rewards_outside_a_proportion_is_the_normal_one() -> None:
    mean, (low, high) = confidence_interval([-2.0, 2.0, 0.0, 4.0])
    assert mean == 1.0
    assert low + high == pytest.approx(2.0)
    assert high - mean == pytest.approx(1.95996 * (20 / 3 / 4) ** 0.5, rel=1e-4)
    with pytest.raises(ValueError, match="at least one"):
        confidence_interval([])


def test_the_promised_keys(tmp_path: Path) -> None:
    summary = write_summary(tmp_path, **FACTS, run_folder=str(tmp_path))
    assert read_summary(tmp_path) == summary
    validation = summary["validation"]
    assert (validation["before"], validation["after"], validation["n"]) == (0.25, 0.75, 4)
    assert len(validation["ci95_before"]) == len(validation["ci95_after"]) == 2
    assert set(summary["attempts"]) == {str(reason) for reason in EndReason}
    assert (summary["attempts"]["ok"], summary["attempts"]["timeout"]) == (10, 2)
    assert summary["weight_versions"] == summary["updates"] + 1
    for name in ("setup", "sft", "rollout", "update", "sync", "idle", "total"):
        assert summary["seconds"][name] >= 0


def test_a_run_in_which_no_token_was_compared_says_so() -> None:
    summary = make_summary(**(FACTS | {"max_logprob_diff": None}))  # type: ignore[arg-type]
    assert summary["max_logprob_diff"] is None
    assert "engine/learner: not compared." in " ".join(render_summary(summary).split())


def test_seconds_add_up() -> None:
    seconds = make_summary(**FACTS)["seconds"]
    assert seconds["idle"] == 5.0
    assert sum(spent for name, spent in seconds.items() if name != "total") == seconds["total"]


def test_a_run_without_its_last_validation_has_a_summary_and_a_text() -> None:
    summary = make_summary(**{**FACTS, "after": None})
    assert summary["validation"]["after"] is None
    assert "after   not measured" in render_summary(summary)


def test_text_is_ascii_fits_and_survives_odd_conversations() -> None:
    odd = [
        {"before": None, "after": {"messages": [], "reward": None}},
        {
            "before": {"messages": [{"role": "user", "content": "caf\u00e9 " * 40}], "error": "x"},
            "after": {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "f", "arguments": "{"}}],
                    },
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "hi"}, {"type": "image_url"}],
                    },
                ],
                "reward": 0.5,
            },
        },
    ]
    text = render_summary(make_summary(**FACTS, examples=odd, events=["x" * 30] * 2), width=90)
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 110
    assert "hi [image_url]" in text
    assert "f({)" in text


def test_a_models_words_move_no_cursor_and_break_no_line() -> None:
    odd = {
        "role": "assistant",
        "content": "a\x1b[2Jb\x1cc\x85d\u2028e\ufffd" * 8,
        "tool_calls": None,
    }
    side = {"messages": [odd], "reward": 0.0, "error": "no\x07bell"}
    example = {"input": {}, "before": side, "after": side}
    text = render_summary(make_summary(**FACTS, examples=[example]), width=80)
    assert text.isascii()
    assert text.splitlines() == text.removesuffix("\n").split("\n")
    assert all(character == "\n" or character.isprintable() for character in text)
    assert r"a\x1b[2Jb\x1cc" in text
    examples = text[text.index("Example 1") : text.index("Try next")]
    assert max(map(len, examples.splitlines())) <= 80


def test_numbers_for_people() -> None:
    assert [duration(s) for s in (0.04, 9.94, 9.96, 59.4, 59.6, 245, 3599.6, 7380)] == [
        "0.0 s", "9.9 s", "10 s", "59 s", "1 min 00 s", "4 min 05 s", "1 h 00 min", "2 h 03 min",
    ]  # fmt: skip
    assert [short(x) for x in (0, 870, 999.6, 4200, 9960, 12345, 1.3e6)] == [
        "0", "870", "1.0k", "4.2k", "10k", "12k", "1.3M",
    ]  # fmt: skip
    assert bar(0.5, 4) == "##  "
    assert bar(2, 3) == "###"
