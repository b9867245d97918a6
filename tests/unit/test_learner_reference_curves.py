"""Ten steps of the learner are those that are committed: a change of its numerics must be deliberate (tests/learner_reference.py renews them)."""

from __future__ import annotations

import json
from pathlib import Path

import learner_reference
import numpy as np
import pytest

# Float32 on other instruction sets (SSE4.2, AVX2, AVX-512) or numbers of threads moves a value by 2e-6 at most.
TOLERANCE = 1e-5
HOW = "where that is meant: PYTHONPATH=.:tests python tests/learner_reference.py --write"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learner_reference.reference_model(tmp_path_factory.mktemp("model"))


def differences(got: dict[str, list[float]], case: str) -> dict[str, float]:
    """By curve, the largest difference from what is committed."""
    committed = json.loads(learner_reference.FILE.read_text())[case]
    return {name: float(abs(np.subtract(got[name], committed[name])).max()) for name in committed}


@pytest.mark.parametrize("case", learner_reference.CASES)
def test_the_curves_are_those_committed(folder: Path, case: str) -> None:
    found = differences(learner_reference.run(folder, case), case)
    assert max(found.values()) < TOLERANCE, f"{case}: {found}; {HOW}"


@pytest.mark.parametrize(
    "change", [{"lr": 1.01e-3}, {"betas": (0.9, 0.951)}, {"max_grad_norm": 0.99}]
)
def test_a_small_change_of_the_numerics_is_seen(folder: Path, change: dict[str, float]) -> None:
    found = differences(learner_reference.run(folder, "grpo", **change), "grpo")
    assert max(found.values()) > 2 * TOLERANCE


def test_every_case_is_committed() -> None:
    assert set(json.loads(learner_reference.FILE.read_text())) == set(learner_reference.CASES)
