"""A whole run of two trained roles with an adapter each, over one engine: both are delivered with every version, and what the engine says
under each role is what the learner says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.whole_run import REPO, WholeRun
from tests.integration.test_run_roles import file_hash, off_by, spans_of
from tests.integration.tiny_model import make

pytestmark = pytest.mark.slow

ROLES = ["planner", "writer"]


def test_both_roles_learn_and_are_answered_with_their_own_adapters(tmp_path: Path) -> None:
    base = make(tmp_path / "model")
    before = file_hash(base)
    extra = [
        f"agent={REPO}/tests/integration/agents_for_tests.py:two_writers",
        "roles={planner: train, writer: train}",
        "learner.lora={rank: 4, per_role: true}",
        *("train.steps=2", "validation.rows=4", "learner.lr=0.05", "runners.num_runners=1"),
    ]
    run = WholeRun(tmp_path, base, extra).start()
    try:
        assert run.finish() == 0, run.text
    finally:
        run.close()
    assert run.left_over() == []
    lines = (run.run_folder / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert len(steps) == 2
    calls: dict[str, list[dict[str, Any]]] = {role: [] for role in ROLES}
    for span in spans_of(run.run_folder):
        if span["kind"] == "call":
            calls[span["role"]].append(span)
    for step, metrics in enumerate(steps, start=1):
        for role in ROLES:
            mine = [call for call in calls[role] if call["step"] == step]
            assert {v for call in mine for _, v in call["weight_versions"]} == {step - 1}
            assert metrics[f"tokens_trained.{role}"] > 0
            assert metrics[f"grad_norm.{role}"] > 0
            assert metrics[f"max_logprob_diff.{role}"] < 1e-4
            # The first version is the base model, the second one is not.
            assert (off_by(base, mine[:4]) < 1e-3) == (step == 1)
    assert file_hash(base) == before
    export = run.run_folder / "export"
    assert sorted(folder.name for folder in export.iterdir()) == ROLES
    check_adapters(base, export)


def check_adapters(base: Path, export: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[40, 41, 42, 43]])
    logits = []
    for role in ROLES:
        plain = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
        adapted = PeftModel.from_pretrained(plain, export / role / "adapter")
        merged = AutoModelForCausalLM.from_pretrained(export / role, dtype="float32")
        with torch.no_grad():
            logits.append(adapted(ids).logits)
            torch.testing.assert_close(logits[-1], merged(ids).logits, atol=1e-4, rtol=1e-4)
    assert (logits[0] - logits[1]).abs().max() > 1e-2
