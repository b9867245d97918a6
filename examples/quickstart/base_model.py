"""The base model of the quickstart, made on the spot: a tiny Qwen3 that can use the calculator but mostly does not do it well.

`make(folder, seed, progress)` is `model.make` of configs/quickstart.yaml. It builds a tokenizer (chat_format.py) and a random model of
0.7 M parameters, and warm-starts it by supervised fine-tuning on made-up conversations (lessons.py) in two stages:

1. skill: correct conversations with the tool, until the agent is right on nearly all of the questions set aside for this;
2. bad habits: a short course on 30 % correct tool use, 50 % answers off the cuff (most of them wrong), 20 % bad tool use.

(Both at once does not work: the model never learns to copy numbers. Skill first, then habits that reinforcement learning
has to break.) Run it alone: `python examples/quickstart/base_model.py FOLDER --seed 0`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import task
from chat_format import make_tokenizer
from lessons import habit_rows, skill_rows

from agl_ray.learner.sft import SFTConfig, SFTStep, train_sft

Progress = Callable[[str, float, str], None]

SKILL = SFTConfig(steps=900, lr=1.5e-3, batch_rows=16, warmup_steps=100, final_lr_share=0.01)
HABITS = SFTConfig(steps=60, lr=7e-4, batch_rows=32, warmup_steps=20)
SKILL_ROWS, HABIT_ROWS = 4000, 2000
CHECK_FROM, CHECK_EVERY, CHECK_ROWS = 750, 50, 256
SKILL_SHARE = 0.98  # of the skill check right, sampled at temperature 1, ends the first stage


def make_model(tokenizer: Any, seed: int) -> Any:
    """A Qwen3 of 0.7 M parameters with random weights, float32.

    Untied embeddings, because vLLM on CPU keeps a stale output head when tied weights are updated.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config)


def learn_skill(model: Any, tokenizer: Any, seed: int, progress: Progress) -> dict[str, Any]:
    """Stage 1: correct tool use only, ended by measured success on questions that nothing else uses."""
    from sampler import share_right

    check = task.skill_check(CHECK_ROWS)
    right = 0.0

    def report(done: SFTStep) -> None:
        progress("skill", done.step / SKILL.steps, f"loss {done.loss:.3f}")

    def skilled(step: int) -> bool:
        nonlocal right
        if step < CHECK_FROM or step % CHECK_EVERY:
            return False
        right = share_right(model, tokenizer, check, seed=step)
        model.train()
        return right >= SKILL_SHARE

    rows = skill_rows(seed, SKILL_ROWS)
    result = train_sft(
        model, tokenizer, rows, replace(SKILL, seed=seed), progress=report, stop=skilled
    )
    progress("skill", 1.0, f"{right:.0%} right")
    return {"steps": result.steps, "seconds": result.seconds, "right": right}


def learn_bad_habits(model: Any, tokenizer: Any, seed: int, progress: Progress) -> dict[str, Any]:
    """Stage 2: a short course on a mixture of good and mostly bad conversations."""
    from sampler import share_right

    def report(done: SFTStep) -> None:
        progress("bad habits", done.step / HABITS.steps, f"loss {done.loss:.3f}")

    rows = habit_rows(seed, HABIT_ROWS)
    result = train_sft(model, tokenizer, rows, replace(HABITS, seed=seed), progress=report)
    right = share_right(model, tokenizer, task.skill_check(CHECK_ROWS), seed=seed)
    progress("bad habits", 1.0, f"{right:.0%} right")
    return {"steps": result.steps, "seconds": result.seconds, "right": right}


def make(folder: Path, seed: int, progress: Progress | None = None) -> dict[str, Any]:
    """Make the base model of `seed` in `folder` (Hugging Face format) and say how it went, also in folder/made.json.

    `progress(stage, share done, text)` is called after each update. One thread, about a minute; the same seed gives the
    same weights on the same machine.
    """
    import torch

    began = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more threads are slower on a busy machine, and not reproducible
    try:
        show = progress or (lambda stage, share, text: None)
        tokenizer = make_tokenizer()
        model = make_model(tokenizer, seed)
        skill = learn_skill(model, tokenizer, seed, show)
        habits = learn_bad_habits(model, tokenizer, seed, show)
    finally:
        torch.set_num_threads(threads)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    seconds = time.perf_counter() - began
    made = {"seed": seed, "seconds": seconds, "skill": skill, "bad_habits": habits}
    (folder / "made.json").write_text(json.dumps(made, indent=2) + "\n")
    return made


def make_untrained(folder: Path, seed: int, progress: Progress | None = None) -> dict[str, Any]:
    """The same model with random weights, in a second: for measurements that need its shape and not its skill."""
    tokenizer = make_tokenizer()
    make_model(tokenizer, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"seed": seed}


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="Make the quickstart's base model.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    def show(stage: str, share: float, text: str) -> None:
        print(f"\r{stage}: {share:4.0%}, {text}", end="   ", flush=True)

    print(json.dumps(make(options.folder, options.seed, show), indent=2))
