"""The benchmark of spans to rows: every key has a meaning, both sides are held to the same tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from agl_ray.bench import trajectory as bench
from agl_ray.bench import tree
from agl_ray.bench.peers import agentlightning_env as agentlightning
from agl_ray.types import RunError

SMALL = (
    bench.Case("chat", num_calls=3, first=20, last=60, response=5, rollouts=2),
    bench.Case("long", num_calls=6, first=10, last=40, response=2, rollouts=1),
)


def answer(plan: dict[str, Any], lost: int = 0) -> list[dict[str, float]]:
    """What the other side says when it finds everything but for `lost` tokens."""
    return [
        {
            "cpu_ms": 10.0,
            "calls": len(case["sizes"]),
            "tokens": sum(map(sum, case["sizes"])) - lost,
            "logprobs": sum(response for _, response in case["sizes"]) * case["logprobs"],
        }
        for case in plan["cases"]
    ]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CASES", SMALL)
    monkeypatch.setattr(bench, "QUICK_SECONDS", 0.0)
    monkeypatch.setattr(tree, "measure", lambda quick: dict.fromkeys(tree.KEYS, 1.0))
    monkeypatch.setattr(agentlightning, "environment", lambda cache: Path("python"))


def meant(key: str) -> bool:
    names = [re.escape(name).replace("CASE", "(chat|chat_plain|long)") for name in bench.KEYS]
    return any(re.fullmatch(name, key) for name in names)


def test_every_key_has_a_meaning(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agentlightning, "ask", lambda python, driver, plan, what: answer(plan))
    numbers = bench.run_trajectory(quick=True)
    assert all(meant(key) for key in numbers), [key for key in numbers if not meant(key)]
    assert numbers["chat_tokens"] == 20 + 40 + 60 + 3 * 5
    assert (numbers["chat_rows"], numbers["chat_row_tokens"]) == (1, 65)
    assert numbers["peer_chat_tokens_per_s"] == pytest.approx(13500)
    ratio = numbers["chat_tokens_per_s"] / numbers["peer_chat_tokens_per_s"]
    assert numbers["adapter_ratio_agl"] == pytest.approx(ratio)


def test_a_side_that_loses_tokens_is_no_comparison(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agentlightning, "ask", lambda *given: answer(given[2], lost=1))
    with pytest.raises(RunError, match=r"case chat: expected 3 triplets of 135 token ids .* got"):
        bench.run_trajectory(quick=True)


def test_alone_it_needs_no_installation(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(agentlightning, "environment")
    numbers = bench.run_trajectory(quick=True, alone=True)
    assert not [key for key in numbers if "peer" in key or "adapter" in key]


def test_a_tree_runs_fewer_tokens_forward_for_the_same_step() -> None:
    numbers = tree.measure(quick=True)
    assert numbers.keys() == tree.KEYS.keys()
    rows = numbers["tree_rows_tokens"]
    assert numbers["tree_tokens_ratio"] == pytest.approx(rows / numbers["tree_tokens"])
    assert numbers["tree_tokens_ratio"] > 2
    assert numbers["tree_trained_tokens"] == 2 * (10 * (8 + 6) + 3 * 8)


def test_sides_that_do_other_work_are_no_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    work = tree._Side.step

    def less(side: Any, *given: Any) -> dict[str, float]:
        metrics = work(side, *given)
        return {
            **metrics,
            "tokens_trained": metrics["tokens_trained"] - (side.trajectory.rows == "tree"),
        }

    monkeypatch.setattr(tree._Side, "step", less)
    monkeypatch.setattr(tree, "QUICK", tree.Agent(2, 5, 4, 3, 2, 3, 2, rollouts=2, groups=1))
    with pytest.raises(RunError, match=r"expected the same tokens_trained .* got 26.0 and 25.0"):
        tree.measure(quick=True)
