"""The base model of the quickstart, made on the spot: a tiny Qwen3 that knows the calculator but mostly does not use it well.

`make(folder, seed, progress)` is `model.make` of configs/quickstart.yaml. It builds a tokenizer and a random model of 0.7 M
parameters and warm-starts it by supervised fine-tuning in two stages:

1. skill: correct conversations with the tool, until the agent is right on 9 of 10 questions set aside for this;
2. bad habits: a short course on 30 % correct tool use, 50 % answers off the cuff (most of them wrong), 20 % bad tool use.

(Both at once does not work: the model never learns to copy numbers. Skill first, then habits that reinforcement learning
has to break.) Run it alone: `python examples/quickstart/base_model.py FOLDER --seed 0`.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import task
from agent import SYSTEM_PROMPT, TOOLS, calculator

Progress = Callable[[str, float, str], None]
Message = dict[str, Any]

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SKILL_ROWS, HABIT_ROWS = 4000, 2000
CHECK_EVERY, CHECK_ROWS = 50, 128
SKILL_SHARE = (
    0.95  # of the skill check answered rightly, sampled at temperature 1, ends the first stage
)
MARKUP = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


# ---------------------------------------------------------------------------------- conversations


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
    """An answer without the tool: 70 % of them wrong, in a way that looks plausible."""
    answer = question.answer
    if rng.random() < 0.7:
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
        retried = rng.random() < 0.4
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
    drawn = [task.draw(rng, task.TRAIN_PARTS) for _ in range(count)]
    return [conversation(question, correct(question)) for question in drawn]


def habit_rows(seed: int, count: int) -> list[dict[str, Any]]:
    rng = random.Random(f"habits {seed}")
    rows = []
    for _ in range(count):
        question = task.draw(rng, task.TRAIN_PARTS)
        kind = rng.choices(["correct", "off the cuff", "misused"], weights=[30, 50, 20])[0]
        if kind == "correct":
            replies = correct(question)
        else:
            replies = (off_the_cuff if kind == "off the cuff" else misused)(question, rng)
        rows.append(conversation(question, replies))
    return rows


# -------------------------------------------------------------------------------------- tokenizer


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer of some 470 tokens, the same for every seed.

    Digits and number words stay whole tokens, so that numbers can be copied; everything else may merge freely, so that the
    constant parts of a conversation ("The answer is ", the JSON around an expression) are one token each.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = sorted([*task.ONES, *task.TENS], key=len, reverse=True)
    split = pre_tokenizers.Split(Regex("|".join([r"\d", *words])), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    template = CHAT_TEMPLATE.read_text()
    tokenizer.train_from_iterator(_texts(template), trainer)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKUP])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def _texts(template: str) -> Iterator[str]:
    """Training text for the BPE: conversations cut where special tokens stand and where the model begins to speak."""
    from transformers.utils.chat_template_utils import render_jinja_template

    rows = skill_rows(0, 600) + habit_rows(0, 600)
    rendered, _ = render_jinja_template(
        [r["messages"] for r in rows], TOOLS, chat_template=template
    )
    markers = "|".join(re.escape(text) for text in SPECIAL + MARKUP)
    for text in rendered:
        for piece in re.split(markers, text):
            head, mark, tail = piece.partition("assistant\n")
            yield from (part for part in (head + mark, tail) if part)


# ------------------------------------------------------------------------------------------ model


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


def share_right(model: Any, tokenizer: Any, rows: list[dict[str, Any]], seed: int) -> float:
    """Share of `rows` that the agent answers rightly, sampled at temperature 1."""
    from sampler import answers

    texts = answers(model, tokenizer, [row["question"] for row in rows], temperature=1.0, seed=seed)
    right = [last_integer(text) == row["answer"] for text, row in zip(texts, rows, strict=True)]
    return sum(right) / len(rows)


def last_integer(text: str) -> int | None:
    found = re.findall(r"-?\d+", text)
    return int(found[-1]) if found else None


def learn_skill(model: Any, tokenizer: Any, seed: int, progress: Progress) -> dict[str, Any]:
    """Stage 1: correct tool use only, ended by measured success on questions that nothing else uses."""
    from agl_ray.learner.sft import SFTConfig, SFTStep, train_sft

    config = SFTConfig(steps=600, lr=1e-3, batch_rows=16, warmup_steps=50, seed=seed)
    check = task.skill_check(CHECK_ROWS)
    right = 0.0

    def report(done: SFTStep) -> None:
        text = f"loss {done.loss:.3f}, {right:.0%} right"
        progress("skill", done.step / config.steps, text)

    def skilled(step: int) -> bool:
        nonlocal right
        if step < config.steps // 2 or step % CHECK_EVERY:
            return False
        right = share_right(model, tokenizer, check, seed=step)
        model.train()
        return right >= SKILL_SHARE

    rows = skill_rows(seed, SKILL_ROWS)
    result = train_sft(model, tokenizer, rows, config, progress=report, stop=skilled)
    progress("skill", 1.0, f"{right:.0%} right")
    return {"steps": result.steps, "seconds": result.seconds, "right": right}


def learn_bad_habits(model: Any, tokenizer: Any, seed: int, progress: Progress) -> dict[str, Any]:
    """Stage 2: a short course on a mixture of good and mostly bad conversations."""
    from agl_ray.learner.sft import SFTConfig, SFTStep, train_sft

    config = SFTConfig(steps=80, lr=1e-3, batch_rows=32, warmup_steps=20, seed=seed)

    def report(done: SFTStep) -> None:
        progress("bad habits", done.step / config.steps, f"loss {done.loss:.3f}")

    rows = habit_rows(seed, HABIT_ROWS)
    result = train_sft(model, tokenizer, rows, config, progress=report)
    right = share_right(model, tokenizer, task.skill_check(CHECK_ROWS), seed=seed)
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


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="Make the quickstart's base model.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    def show(stage: str, share: float, text: str) -> None:
        print(f"\r{stage}: {share:4.0%}, {text}", end="   ", flush=True)

    print(json.dumps(make(options.folder, options.seed, show), indent=2))
