"""The base model's recipe on a very short schedule: what it writes, that a seed fixes it, what its lessons say."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "quickstart"))

import base_model
import lessons
import task

torch = pytest.importorskip("torch")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model, "SKILL", replace(base_model.SKILL, steps=3))
    monkeypatch.setattr(base_model, "HABITS", replace(base_model.HABITS, steps=2))
    monkeypatch.setattr(base_model, "SKILL_ROWS", 32)
    monkeypatch.setattr(base_model, "HABIT_ROWS", 32)
    monkeypatch.setattr(base_model, "CHECK_ROWS", 4)


@pytest.mark.usefixtures("short")
def test_a_seed_fixes_the_folder(tmp_path: Path) -> None:
    seen: list[tuple[str, float, str]] = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        base_model.make(tmp_path / name, seed, lambda *step: seen.append(step))
    assert {stage for stage, _, _ in seen} == {"skill", "bad habits"}
    assert all(0 < share <= 1 for _, share, _ in seen)
    first, again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert first == again != other
    texts = [(tmp_path / name / "tokenizer.json").read_text() for name in "abc"]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.usefixtures("short")
def test_the_folder_loads_and_the_agent_can_be_played(tmp_path: Path) -> None:
    from sampler import answers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base_model.make(tmp_path / "model", 0, None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.float32
    assert not model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.eos_token == "<|im_end|>"
    assert json.loads((tmp_path / "model" / "made.json").read_text())["seed"] == 0
    questions = [row["question"] for row in task.val(0)[:3]]
    played = [answers(model, tokenizer, questions, temperature=1.0, seed=5) for _ in range(2)]
    assert played[0] == played[1]
    assert len(played[0]) == 3


def test_batched_sampling_equals_one_at_a_time(tmp_path: Path) -> None:
    """Left padding and the cache change nothing: greedy text of a batch = greedy text of each alone = no cache at all."""
    from sampler import sample

    tokenizer = base_model.make_tokenizer()
    model = base_model.make_model(tokenizer, 0).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4.0)  # far from uniform
    texts = ["<|im_start|>user\nadd 1 and 2", "12", "<|im_start|>assistant\nThe answer is "]
    prompts = tokenizer(texts)["input_ids"]
    generator = torch.Generator()
    together = sample(model, prompts, tokenizer.eos_token_id, 12, 0.0, generator)
    for prompt, new in zip(prompts, together, strict=True):
        assert sample(model, [prompt], tokenizer.eos_token_id, 12, 0.0, generator) == [new]
        ids = list(prompt)
        for token in new:
            with torch.no_grad():
                assert int(model(torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


def finals(rows: list[dict[str, Any]]) -> list[str]:
    return [row["messages"][-1]["content"] for row in rows]


def test_the_skill_is_always_right_and_the_habits_mostly_wrong() -> None:
    rng = random.Random(0)
    questions = [task.draw(rng, task.TRAIN_PARTS) for _ in range(400)]
    right = [task.is_right(lessons.correct(q)[-1]["content"], q.answer) for q in questions]
    assert all(right)
    guessed = [lessons.off_the_cuff(q, rng)[-1]["content"] for q in questions]
    share = sum(task.is_right(t, q.answer) for t, q in zip(guessed, questions, strict=True)) / 400
    assert 0.2 < share < 0.4
    for question in questions:
        replies = lessons.misused(question, rng)
        assert replies[-1]["content"]
        assert [reply["role"] for reply in replies[:2]] == ["assistant", "tool"]


def test_no_lesson_uses_a_held_out_question() -> None:
    kept = {row["question"] for row in task.val(0) + task.skill_check(192)}
    for row in lessons.skill_rows(0, 500) + lessons.habit_rows(0, 500):
        assert row["messages"][1]["content"] not in kept
