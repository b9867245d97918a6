"""The benchmark of the learner: every key has a meaning, both sides get the same rows, another gradient is no comparison."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agl_ray.bench import learner as bench
from agl_ray.bench import learner_side
from agl_ray.bench.peers import environment as peer
from agl_ray.bench.peers import trl_env as trl
from agl_ray.types import RunError

SMALL = bench.Size(
    rows=8, steps=3, peer_steps=2, micros=(4, 8), by_rows=((2, 16),), by_length=((1, 32),)
)


def answer(plan: dict[str, Any], **more: Any) -> dict[str, Any]:
    tokens = sum(len(prompt) + len(said) for prompt, said, _ in json.loads(_text(plan)))
    found = {"cpu_s": [2.0, 1.0, 3.0], "wall_s": [4.0], "grad_norm": 0.5, "tokens": tokens}
    return {**found, "before_mib": 100.0, "peak_mib": 300.0, **more}


def _text(plan: dict[str, Any]) -> str:
    return Path(plan["rows"]).read_text()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The plans that TRL got; it takes twice the time with micro-batches of 8 and half the memory with those of 4."""
    plans: list[dict[str, Any]] = []

    def theirs(python: Path, plan: dict[str, Any]) -> dict[str, Any]:
        plans.append(plan)
        some = {"cpu_s": [plan["micro"]], "peak_mib": 100 * plan["micro"], "padded_tokens": 9000}
        return answer(plan, **some)

    monkeypatch.setattr(bench, "QUICK", SMALL)
    monkeypatch.setattr(trl, "environment", lambda cache: Path("python"))
    monkeypatch.setattr(trl, "train", theirs)
    monkeypatch.setattr(peer, "ask", lambda *given: answer(given[2], growth=[0.1, 0.2]))
    return plans


def meant(key: str) -> bool:
    return any(
        re.fullmatch(re.sub(r"N(?=_|$)", r"\\d+", name).replace("microN", r"micro\d+"), key)
        for name in bench.KEYS
    )


def test_every_key_has_a_meaning_and_the_best_of_the_peer_counts(
    asked: list[dict[str, Any]],
) -> None:
    numbers = bench.run_learner(quick=True)
    assert all(meant(key) for key in numbers), [key for key in numbers if not meant(key)]
    assert [plan["micro"] for plan in asked] == [4, 8]
    assert numbers["tokens_ratio_trl"] == pytest.approx(4 / 2)
    assert numbers["memory_ratio_trl"] == pytest.approx(300 / 400)
    assert numbers["memory_step_ratio_trl"] == pytest.approx(200 / 300)
    assert numbers["growth_rows_2_us_per_token"] == pytest.approx(1e6 * 0.1 / 32)


def test_another_gradient_is_no_comparison(
    asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.trl, "train", lambda _, plan: answer(plan, grad_norm=0.51))
    with pytest.raises(RunError, match=r"expected the same gradient on both sides, got norms 0\.5"):
        bench.run_learner(quick=True)


def test_alone_it_needs_no_installation(
    asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(trl, "environment")
    numbers = bench.run_learner(quick=True, alone=True)
    assert not [key for key in numbers if "trl" in key]


def test_rows_are_ragged_and_our_side_trains_on_all_their_completions(tmp_path: Path) -> None:
    made = bench.ragged(16)
    lengths = [len(prompt) + len(said) for prompt, said, _ in made]
    assert (min(lengths) < 20, max(lengths)) == (True, 512)
    rows = learner_side.rows_of(made)
    assert rows.lengths.tolist() == lengths
    assert rows.weights.sum() == sum(len(said) for _, said, _ in made)
    np.testing.assert_allclose(rows.columns["scale"].max() * rows.weights.sum(), 1, rtol=1e-6)


def test_our_side_answers_what_is_asked(tmp_path: Path) -> None:
    bench.make_model(tmp_path / "model")
    (tmp_path / "rows.json").write_text(json.dumps([([5, 6], [7, 8], 1.0), ([5], [9, 7], -1.0)]))
    plan = learner_side.Plan(
        model=str(tmp_path / "model"),
        rows=str(tmp_path / "rows.json"),
        tokens=100,
        steps=2,
        growth=[(2, 8)],
        lr=1e-4,
        max_grad_norm=1.0,
    )
    found = learner_side.measure(plan)
    assert (len(found["cpu_s"]), len(found["growth"]), found["tokens"]) == (1, 1, 7)
    assert found["grad_norm"] > 0
    assert found["peak_mib"] >= found["before_mib"] > 0
